"""What a machine can do: data sheets of GPUs, and measurements of the machine at hand."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import psutil
import torch

from minisft.errors import UserError
from minisft.models import build_on_meta_device
from minisft.planning.model_cost import count_cost, shortened
from minisft.recipe import LoraRecipe
from minisft.training.attention import PADDING_FREE, register
from minisft.training.device import cpu_has_bf16_arithmetic, on_cpu
from minisft.training.lora import add_lora
from minisft.training.master_weights import MasterWeights, uses_masters

Precision = Literal["fp32", "bf16", "fp16"]
MIB = 1 << 20

# Share of a GPU's memory that training can use. No formula covers the rest: the CUDA context, NCCL's buffers and the
# fragmentation of the allocator.
_GPU_SHARE_USABLE = 0.92
# Share of the peak rate of matrix products that a complete training step reaches. On a GPU, relative to the data
# sheet's rate, full fine-tuning of 7B models on eight H100 or A100 reaches 0.35 to 0.5 (MosaicML's LLM Foundry,
# scripts/train/benchmarking). On a CPU, relative to the measured rate, it was 0.73 (docs/planning.md).
_GPU_UTILISATION = 0.40
_CPU_UTILISATION = 0.75
# Bytes per second that gloo sends between two processes of one machine, measured in training steps (docs/planning.md).
_GLOO_BYTES_PER_SECOND = 0.5e9
# Bytes per second of host memory for one process: a host with two sockets has about 400e9 for eight processes.
_HOST_BANDWIDTH = 50e9


@dataclass(frozen=True)
class Machine:
    """The hardware that one process of a training job has.

    Attributes:
        name: Name under which the user selects the machine.
        kind: cpu or gpu.
        memory: Bytes that a process may use: of the GPU, or its share of the memory that is free on the machine now.
        flops: Floating-point operations per second of matrix products, by precision.
        utilisation: Share of `flops` that forward and backward reach.
        bandwidth: Bytes per second at which the process reads and writes its memory.
        link: Bytes per second that a process sends to another process of the same node.
        network: Bytes per second that a process sends to another node.
        host_link: Bytes per second between the GPU and the host's memory, for offload.
        host_bandwidth: Bytes per second at which the host's memory is read and written, for an offloaded update.
        per_node: Largest number of processes of a node.
        source: Where the figures come from.
        measured: True where the figures were measured on this machine, so that more can be measured.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    memory: float
    flops: dict[str, float]
    utilisation: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    host_bandwidth: float
    per_node: int
    source: str
    measured: bool = False

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability of a GPU by NVIDIA's name for it; that of an A100 where it is not known here."""
        return _CAPABILITIES.get(self.name.split("-")[0], (8, 0))


_CAPABILITIES = {
    "h100": (9, 0), "h200": (9, 0), "b200": (10, 0), "gb200": (10, 0), "b300": (10, 3), "l40s": (8, 9), "l4": (8, 9),
    "a10": (8, 6), "5090": (12, 0), "4090": (8, 9),
}  # fmt: skip


def total_memory(machine: Machine) -> int:
    """Return the bytes of a GPU's memory, with those that training cannot use."""
    return round(machine.memory / _GPU_SHARE_USABLE)


def _gpu(
    name: str, mib: int, tensor: float, fp32: float, bandwidth: float, link: float, network: float, host: float
) -> Machine:
    half = tensor * 1e12
    return Machine(
        name=name, kind="gpu", memory=mib * MIB * _GPU_SHARE_USABLE,
        flops={"bf16": half, "fp16": half, "fp32": fp32 * 1e12}, utilisation=_GPU_UTILISATION,
        bandwidth=bandwidth * 1e9, link=link * 1e9, network=network * 1e9, host_link=host * 1e9,
        host_bandwidth=_HOST_BANDWIDTH, per_node=8, source="the maker's data sheet",
    )  # fmt: skip


# Rates are dense (without sparsity), with fp32 accumulation; they and the memory bandwidth come from the data sheets.
# The memory is what nvidia-smi or rocm-smi shows. Links are about 0.8 of the rate of NVLink, Infinity Fabric or PCIe in
# one direction, which NCCL reaches. The network is one 400 Gb/s (H100 SXM and later) or 200 Gb/s (A100 SXM) adapter for
# each GPU, as in a DGX, else 100 Gb/s for the node. Plain h100 and a100 are the SXM modules.
_DATA_SHEETS = (
    # name          MiB    TFLOP/s half, fp32; GB/s of memory, link, network, host
    ("h100",       81559,    989,    67, 3350, 360,  40,  50),
    ("h100-pcie",  81559,    756,    51, 2000,  50, 1.5,  50),
    ("h100-nvl",   95830,    835,    60, 3900, 240, 1.5,  50),
    ("h200",      143771,    989,    67, 4800, 360,  40,  50),
    ("b200",      183359,   2250,    75, 7700, 720,  40,  50),
    ("gb200",     189471,   2500,    80, 8000, 720,  40, 180),
    ("b300",      275040,   2250,    75, 7700, 720,  80, 100),
    ("a100",       81920,    312,  19.5, 2000, 240,  20,  25),
    ("a100-pcie",  81920,    312,  19.5, 1900,  25, 1.5,  25),
    ("mi300x",    196592,   1307, 163.4, 5300,  50,  40,  50),
    ("l40s",       46068,    362,  91.6,  864,  25, 1.5,  25),
    ("l4",         23034,    121,  30.3,  300,  12, 1.5,  25),
    ("a10",        23028,    125,  31.2,  600,  12, 1.5,  25),
    ("5090",       32607,  209.5, 104.8, 1790,  25, 1.5,  50),
    ("4090",       24564,    165,  82.6, 1000,  12, 1.5,  25),
)  # fmt: skip
GPUS = {sheet[0]: _gpu(*sheet) for sheet in _DATA_SHEETS}


def machine_named(name: str | None, processes: int, precision: str = "auto") -> Machine:
    """Return the hardware for each of `processes` on a node.

    Args:
        name: One of `GPUS`, or `cpu`; None means this machine, which is measured.
        processes: Number of processes that share a CPU.
        precision: The recipe's `training.precision`, in which a CPU is measured.

    Raises:
        UserError: The name is unknown, or the machine does not support the precision.
    """
    # 1. This machine's CPU, by name or because there is no GPU.
    if name == "cpu" or (name is None and on_cpu()):
        return measure_cpu(processes, cpu_precision(precision))
    # 2. A GPU by name.
    if name is not None:
        if name.lower() not in GPUS:
            raise UserError(f"--gpu {name}", "the machine is unknown", f"use one of {', '.join([*GPUS, 'cpu'])}")
        return GPUS[name.lower()]
    # 3. This machine's GPU: its own memory, and the speed of its data sheet, or a measured one.
    properties = torch.cuda.get_device_properties(0)
    found = gpu_of_device_name(properties.name) or measure_gpu(properties.name)
    return replace(found, memory=properties.total_memory * _GPU_SHARE_USABLE, per_node=torch.cuda.device_count())


def gpu_of_device_name(device: str) -> Machine | None:
    """Return the GPU whose data sheet belongs to a device's name, such as "NVIDIA H100 80GB HBM3"; None: unknown.

    The name consists of words and numbers: "A100-SXM4-80GB" is an a100 and no a10, and an A10G, which has another rate
    than an A10, is unknown. Of several GPUs that match, the one with the most words is it: h100-pcie before h100.
    """
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    matching = [name for name in GPUS if set(name.split("-")) <= words]
    return GPUS[max(matching, key=lambda name: name.count("-"))] if matching else None


def require_count(machine: Machine, count: int, nodes: int) -> None:
    """Check that a node can have `count` processes, and that there can be this number of nodes.

    Raises:
        UserError: The count or the number of nodes is impossible; the error names the option and the largest value.
    """
    for option, value in (("--count", count), ("--nodes", nodes)):
        if value < 1:
            raise UserError(f"{option} {value}", "the number must be at least 1", f"give {option} 1 or more")
    if machine.kind == "cpu" and nodes > 1:
        problem = "the speed of the network between CPU machines is unknown"
        raise UserError(f"--nodes {nodes}", problem, "give --nodes 1")
    if count > machine.per_node:
        nodes_needed = -(-count // machine.per_node)
        fix = f"give at most --count {machine.per_node}"
        if machine.kind == "gpu":
            fix += f"; for {count} GPUs give --count {machine.per_node} --nodes {nodes_needed}"
        unit = "cores on this machine" if machine.kind == "cpu" else machine.name
        raise UserError(f"--count {count}", f"a node has at most {machine.per_node} {unit}", fix)


# --- this machine's CPU -----------------------------------------------------------------------------------

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def cpu_precision(precision: str) -> str:
    """Return fp32 or bf16 for the recipe's `precision` on this machine's CPU, even where a GPU is available.

    Raises:
        UserError: The precision is fp16.
    """
    if precision == "fp16":
        raise UserError("training.precision", "fp16 is for GPUs, and this plan is for a CPU", "use auto, fp32 or bf16")
    if precision == "auto":
        return "bf16" if cpu_has_bf16_arithmetic() else "fp32"
    return precision


def measure_cpu(processes: int, precision: str) -> Machine:
    """Measure this machine's matrix products and memory for about two seconds, shared by `processes`."""
    cores = len(os.sched_getaffinity(0))
    # 1. Memory bandwidth.
    bandwidth = _measure_bandwidth() / processes
    # 2. Operations per second of a product as large as a layer's: (1024, 1024) by (1024, 2048).
    dtype = getattr(torch, _TORCH_NAMES[precision])
    left, right = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 2048, dtype=dtype)
    rate = 2 * 1024 * 1024 * 2048 * _runs_per_second(lambda: left @ right)
    return Machine(
        name="cpu", kind="cpu", memory=free_memory() / processes, flops={precision: rate / processes},
        utilisation=_CPU_UTILISATION, bandwidth=bandwidth, link=_GLOO_BYTES_PER_SECOND, network=_GLOO_BYTES_PER_SECOND,
        host_link=bandwidth, host_bandwidth=bandwidth, per_node=cores,
        source=f"{rate / 1e9:.0f} GFLOP/s measured on {cores} cores", measured=True,
    )  # fmt: skip


def measure_gpu(name: str, device: str = "cuda", size: int = 8192) -> Machine:
    """Measure the products and the memory of a GPU that no data sheet here describes, for about three seconds.

    Its links cannot be measured from one process: those of PCIe 4.0 are assumed, as they are the slowest.

    Args:
        name: Name of the device.
        device: Device to measure.
        size: Rows and columns of the matrices.
    """
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    rates = {}
    for precision, type_name in _TORCH_NAMES.items():
        left, right = torch.randn(2, size, size, device=device, dtype=torch.float32).to(getattr(torch, type_name))
        rates[precision] = 2 * size**3 * _runs_per_second(partial(torch.mm, left, right), wait)
    rates["fp16"] = rates["bf16"]
    return Machine(
        name=name, kind="gpu", memory=0, flops=rates, utilisation=_GPU_UTILISATION,
        bandwidth=_measure_bandwidth(device, wait), link=12e9, network=1.5e9, host_link=12e9,
        host_bandwidth=_HOST_BANDWIDTH, per_node=1,
        source=f"{rates['bf16'] / 1e12:.3g} TFLOP/s measured in bf16; links of PCIe 4.0 are assumed",
    )  # fmt: skip


def _measure_bandwidth(device: str = "cpu", wait: Callable[[], None] = lambda: None) -> float:
    """Return the bytes read and written per second by an addition in place; its memory is free again afterwards."""
    numbers = 1 << 24 if device == "cpu" else 1 << 28  # more than the caches hold
    values, addend = torch.zeros(numbers, device=device), torch.zeros(numbers, device=device)
    return 3 * values.nbytes * _runs_per_second(lambda: values.add_(addend), wait)


def _runs_per_second(
    work: Callable[[], object], wait: Callable[[], None] = lambda: None, seconds: float = 0.8
) -> float:
    """Return how many times per second `work` runs, by its shortest duration: other programs only make it longer.

    Args:
        work: What to run.
        wait: Returns when the device has done it.
        seconds: Duration of the measurement.
    """
    work()
    wait()
    durations: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(durations) < 3:
        started = time.perf_counter()
        work()
        wait()
        durations.append(time.perf_counter() - started)
    return 1 / min(durations)


def load_of_machine() -> float:
    """Return the load average of the last minute: where it is high, the speed of a shared machine was measured."""
    return os.getloadavg()[0]


def free_memory() -> float:
    """Return the bytes that are free on this machine, at most the limit of the process's control group."""
    limits = [float(psutil.virtual_memory().available)]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 (a file of the Linux kernel)
                limits.append(float(file.read()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


# --- the layer benchmark ----------------------------------------------------------------------------------

_LAYERS = 2
_LENGTHS = (128, 128, 128)  # tokens of each conversation of the row
_ROUNDS = 5
# Parameters of the layers. Larger layers take too long, and their products are so large that little else counts.
_MOST_PARAMETERS = 1e8
# Share of the layers' rate that a step reaches. The output layer makes it slower: its gradient is as large as the
# vocabulary, and in half precision it is summed in fp32, into memory that is new for every row.
_UTILISATION = {"fp32": 0.95, "bf16": 0.65}


def shortest_time(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several runs, without the first, which allocates gradients and kernels."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def with_layer_benchmark(
    machine: Machine,
    config: Any,
    precision: str,
    processes: int,
    *,
    lora: LoraRecipe | None = None,
    lengths: tuple[int, ...] = _LENGTHS,
    most_parameters: float = _MOST_PARAMETERS,
    shortest_time: Callable[[Callable[[], object]], float] = shortest_time,
) -> Machine:
    """Return a measured CPU with the rate at which it trains layers of a model, in place of the rate of its products.

    The operations between the products (casts, norms, attention, gradient accumulation) take a share that depends on
    the processor and on the size of the layers: relative to the rate of a large product, a 135M model's layers reached
    0.55 in fp32 and 0.13 in bf16 on a processor with AMX, and a complete step 0.73 in fp32 on a processor with AVX2.

    Args:
        machine: Hardware of each of `processes`. It is returned unchanged where the model's layers are too large to
            be tried in a second, or where the model cannot train without padding.
        config: Configuration of the model.
        precision: fp32 or bf16.
        processes: Number of processes that share the machine.
        lora: The adapters; None trains all weights.
        lengths: Tokens of each conversation in the row that the layers compute.
        most_parameters: Number of parameters above which the layers are too large to be tried.
        shortest_time: Runs the work given to it several times, and returns the seconds of the fastest run.
    """
    try:
        rate = _benchmark_layers(config, precision, lora, lengths, most_parameters, shortest_time)
    except Exception:  # a model's code may raise anything; training or `check` reports the error
        return machine
    if rate is None:
        return machine
    return replace(
        machine, flops={precision: rate / processes}, utilisation=_UTILISATION[precision],
        source=f"{rate / 1e9:.0f} GFLOP/s measured on layers of this model, on {machine.per_node} cores",
    )  # fmt: skip


def _benchmark_layers(
    config: Any,
    precision: str,
    lora: LoraRecipe | None,
    lengths: tuple[int, ...],
    most_parameters: float,
    shortest_time: Callable[[Callable[[], object]], float],
) -> float | None:
    """Return operations per second of forward and backward, as `ModelCost` counts them; None: the layers are large."""
    # 1. Two layers, and a tiny vocabulary: the output layer is not part of the benchmark.
    config = shortened(config, _LAYERS)
    text_config = config.get_text_config()
    text_config.vocab_size = 128
    text_config.pad_token_id = None
    # 2. Count the operations of a row. Vanilla in bf16 has bf16 weights and fp32 masters; LoRA has autocast.
    masters = uses_masters("vanilla", precision, lora=lora is not None)
    autocast = precision != "fp32" and not masters
    cost = count_cost(config, "half" if masters else "autocast" if autocast else "fp32", lora)
    if cost.parameters > most_parameters:
        return None
    tokens, squares = sum(lengths), float(sum(length**2 for length in lengths))
    operations = tokens * cost.step_flops(checkpointing=False) + cost.attention_flops(squares, False)
    # 3. Build the layers with random weights, without a change of the global random state.
    register()
    dtype = torch.bfloat16 if autocast else torch.float32  # of frozen weights, and of weights that are trained
    with torch.random.fork_rng():
        model: Any = build_on_meta_device(config, attn_implementation=PADDING_FREE, dtype=dtype)
        if lora is not None:
            model = add_lora(model, lora, base_name="", seed=0)
    if masters:
        MasterWeights(model)
    body = getattr(model, "get_base_model", lambda: model)().base_model.train()
    # 4. Time forward and backward of the row.

    def forward_and_backward() -> None:
        ids = torch.zeros((1, tokens), dtype=torch.long)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = body(input_ids=ids, position_ids=positions, conversation_lengths=lengths, use_cache=False)
        output.last_hidden_state.sum().backward()

    return operations / shortest_time(forward_and_backward)
