"""What a machine can do: data sheets of GPUs, and measurements of the machine at hand."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil
import torch

from minisft.errors import UserError
from minisft.models import build_on_meta_device
from minisft.planning.model_cost import count_cost, shortened
from minisft.training.attention import PADDING_FREE, register
from minisft.training.device import cpu_has_bf16_arithmetic, on_cpu

Precision = Literal["fp32", "bf16", "fp16"]
MIB = 1 << 20

# Of a GPU's memory: the CUDA context, NCCL's buffers and the gaps of the allocator are in nobody's formula.
_GPU_SHARE_USABLE = 0.92
# Of what matrix products reach at their best, a whole training step reaches this share. On a GPU: of the data
# sheet's rate, full fine-tuning of 7B models on eight H100 or A100 reaches 0.35 to 0.5 (MosaicML's LLM Foundry,
# scripts/train/benchmarking). On a CPU: of the measured rate, 0.73 of a step is products (docs/planning.md).
_GPU_UTILISATION = 0.40
_CPU_UTILISATION = 0.75
_GLOO = 0.5e9  # bytes a second between two processes of one machine, measured in training steps (docs/planning.md)
_HOST_BANDWIDTH = 50e9  # of one process: a two-socket host has some 400e9 for eight


@dataclass(frozen=True)
class Machine:
    """What one process of a training job has.

    Attributes:
        name: as the user names it.
        kind: cpu or gpu.
        memory: bytes that a process may use: of the GPU, or of what is free on the machine now.
        flops: floating-point operations a second of matrix products, by precision.
        utilisation: the share of `flops` that forward and backward reach.
        bandwidth: bytes a second that reading and writing the process's memory takes.
        link: bytes a second that a process sends to another one of the same node.
        network: the same to another node.
        host_link: the same to the host's memory, for offload.
        host_bandwidth: of the host's memory, for the update there.
        per_node: processes of a node at most.
        source: where the figures come from.
        measured: whether they were measured here, so that more can be.
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


def _gpu(
    name: str, *, mib: int, tensor: float, fp32: float, bandwidth: float, link: float, network: float, host: float
) -> Machine:
    return Machine(
        name=name, kind="gpu", memory=mib * MIB * _GPU_SHARE_USABLE,
        flops={"bf16": tensor, "fp16": tensor, "fp32": fp32}, utilisation=_GPU_UTILISATION, bandwidth=bandwidth,
        link=link, network=network, host_link=host, host_bandwidth=_HOST_BANDWIDTH, per_node=8,
        source="NVIDIA's data sheet",
    )  # fmt: skip


# Dense rates and memory bandwidth: NVIDIA's data sheets of H100 SXM, A100 80GB SXM, L40S and RTX 4090; memory as
# nvidia-smi shows it. Links are about 0.8 of NVLink's or PCIe's rate in one direction, which NCCL reaches; the
# network is one 400 Gb/s (H100) or 200 Gb/s (A100) adapter for each GPU, as in a DGX, else 100 Gb/s for the node.
GPUS = {
    "h100": _gpu("h100", mib=81559, tensor=989e12, fp32=67e12, bandwidth=3.35e12, link=360e9, network=40e9, host=50e9),
    "a100": _gpu("a100", mib=81920, tensor=312e12, fp32=19.5e12, bandwidth=2.0e12, link=240e9, network=20e9, host=25e9),
    "l40s": _gpu("l40s", mib=46068, tensor=362e12, fp32=91.6e12, bandwidth=864e9, link=25e9, network=1.5e9, host=25e9),
    "4090": _gpu("4090", mib=24564, tensor=165e12, fp32=82.6e12, bandwidth=1e12, link=12e9, network=1.5e9, host=25e9),
}  # fmt: skip


def machine_named(name: str | None, processes: int, precision: str = "auto") -> Machine:
    """Return the machine `name` for each of `processes` on a node; None is this one, measured.

    Raises:
        UserError: there is no such machine, or it does not have the precision.
    """
    if name == "cpu" or (name is None and on_cpu()):
        return measure_cpu(processes, cpu_precision(precision))
    if name is None:
        return _this_gpu()
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}", "there is no such machine", f"use one of {', '.join([*GPUS, 'cpu'])}")
    return GPUS[name.lower()]


def require_count(machine: Machine, count: int, nodes: int) -> None:
    """Check that a node can have `count` processes, and that there can be `nodes` of them.

    Raises:
        UserError: naming the option and what is possible.
    """
    for option, value in (("--count", count), ("--nodes", nodes)):
        if value < 1:
            raise UserError(f"{option} {value}", "there must be one at least", f"give {option} 1 or more")
    if machine.kind == "cpu" and nodes > 1:
        raise UserError(f"--nodes {nodes}", "the network between CPU machines is not known here", "give --nodes 1")
    if count > machine.per_node:
        whole = -(-count // machine.per_node)
        fix = f"give at most --count {machine.per_node}"
        if machine.kind == "gpu":
            fix += f"; for {count} of them --count {machine.per_node} --nodes {whole}"
        problem = f"a node has at most {machine.per_node} {'cores here' if machine.kind == 'cpu' else machine.name}"
        raise UserError(f"--count {count}", problem, fix)


def _this_gpu() -> Machine:
    properties = torch.cuda.get_device_properties(0)
    select_kernel, count = properties.total_memory * _GPU_SHARE_USABLE, torch.cuda.device_count()
    for name, machine in GPUS.items():
        if name in properties.name.lower().replace(" ", ""):
            return replace(machine, memory=select_kernel, per_node=count)
    source = "its speed is not known here, that of an l40s is assumed"
    return replace(GPUS["l40s"], name=properties.name, memory=select_kernel, per_node=count, source=source)


# --- the CPU at hand --------------------------------------------------------------------------------------


def cpu_precision(asked: str) -> str:
    """Return fp32 or bf16 for the recipe's `precision` on this machine's CPU, whether or not there is a GPU too.

    Raises:
        UserError: fp16.
    """
    if asked == "fp16":
        raise UserError("training.precision", "fp16 is for GPUs, and this plan is for a CPU", "use auto, fp32 or bf16")
    if asked == "auto":
        return "bf16" if cpu_has_bf16_arithmetic() else "fp32"
    return asked


def measure_cpu(processes: int, precision: str) -> Machine:
    """Measure this machine's matrix products and memory for about two seconds, shared by `processes`."""
    cores = len(os.sched_getaffinity(0))
    bandwidth = _measure_bandwidth() / processes
    rate = _measure_products(getattr(torch, _TORCH_NAMES[precision]))
    return Machine(
        name="cpu", kind="cpu", memory=free_memory() / processes, flops={precision: rate / processes},
        utilisation=_CPU_UTILISATION, bandwidth=bandwidth, link=_GLOO, network=_GLOO, host_link=bandwidth,
        host_bandwidth=bandwidth, per_node=cores, source=f"{rate / 1e9:.0f} GFLOP/s measured on {cores} cores",
        measured=True,
    )  # fmt: skip


_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def load_of_machine() -> float:
    """Processes at work over the last minute: with many, what was measured is the speed of a shared machine."""
    return os.getloadavg()[0]


def free_memory() -> float:
    """Bytes that are free on this machine, at most those of the control group that the process may not leave."""
    limits = [float(psutil.virtual_memory().available)]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 (a kernel file)
                limits.append(float(file.read()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


def _measure_products(dtype: torch.dtype) -> float:
    """Operations a second of products as large as a layer's: (1024, 1024) by (1024, 2048)."""
    left, right = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 2048, dtype=dtype)
    return 2 * 1024 * 1024 * 2048 * _rate(lambda: left @ right)


def _measure_bandwidth() -> float:
    """Bytes read and written a second by an addition in place over 128 MB."""
    values, other = torch.zeros(1 << 24), torch.zeros(1 << 24)
    return 3 * values.nbytes * _rate(lambda: values.add_(other))


def _rate(work: Callable[[], object], seconds: float = 0.8) -> float:
    """How often a second `work` is done, by its shortest duration: others can only make it longer."""
    work()
    durations: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(durations) < 3:
        begun = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begun)
    return 1 / min(durations)


_LAYERS = 2
_LENGTHS = (128, 128, 128)  # tokens of a row's conversations
_ROUNDS = 5
_MOST_PARAMETERS = 1e8  # more take too long, and their products are so large that little else counts
# A step is slower than its layers by the output layer, whose gradient is as large as the vocabulary; in half precision
# that is summed in fp32, into memory that is new for every row.
_UTILISATION = {"fp32": 0.95, "bf16": 0.65}


def shortest_time(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several runs, without the first one, which makes gradients and kernels."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def with_layer_benchmark(
    machine: Machine,
    config: Any,
    precision: str,
    processes: int,
    *,
    lengths: tuple[int, ...] = _LENGTHS,
    most_parameters: float = _MOST_PARAMETERS,
    shortest_time: Callable[[Callable[[], object]], float] = shortest_time,
) -> Machine:
    """Return a measured CPU with the rate at which it trains layers of a model, in place of its products'.

    What stands between the products (casts, norms, attention, the adding of gradients) takes a share that depends on
    the processor and on the size of the layers: of the rate of a large product, a 135M model's layers reached 0.55 in
    fp32 and 0.13 in bf16 on a processor with AMX, and a whole step 0.73 in fp32 on one with AVX2.

    Args:
        machine: for each of `processes`. It is returned as it is where the model has larger layers than can be tried
            in a second, or is none that trains without padding.
        config: the model's.
        precision: fp32 or bf16.
        processes: that share the machine.
        lengths: Tokens of each conversation in the row that the layers compute.
        most_parameters: Number of parameters above which the layers are too large to be tried.
        shortest_time: Runs the work given to it several times, and returns the seconds of the fastest run.
    """
    try:
        rate = _benchmark_layers(config, precision, lengths, most_parameters, shortest_time)
    except Exception:  # anything that a model's code raises; training or `check` says what it is
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
    lengths: tuple[int, ...],
    most_parameters: float,
    shortest_time: Callable[[Callable[[], object]], float],
) -> float | None:
    """Return operations a second, as `ModelCost` counts them, of forward and backward; None: the layers are large."""
    config = _small(config)
    half = precision != "fp32"
    cost = count_cost(config, "autocast" if half else "fp32")
    if cost.parameters > most_parameters:
        return None
    tokens, squares = sum(lengths), float(sum(length**2 for length in lengths))
    operations = tokens * cost.step_flops(checkpointing=False) + cost.attention_flops(squares, False)
    body = _model(config)
    return operations / shortest_time(lambda: _forward_and_backward(body, lengths, half))


def _small(config: Any) -> Any:
    """Return the configuration with two layers and hardly a vocabulary: the output layer is not part of this."""
    config = shortened(config, _LAYERS)
    text = config.get_text_config()
    text.vocab_size = 128
    text.pad_token_id = None
    return config


def _model(config: Any) -> torch.nn.Module:
    register()
    with torch.random.fork_rng():
        model = build_on_meta_device(config, attn_implementation=PADDING_FREE, dtype=torch.float32)
    return model.base_model.train()  # type: ignore[no-any-return]


def _forward_and_backward(body: torch.nn.Module, lengths: tuple[int, ...], half: bool) -> None:
    ids = torch.zeros((1, sum(lengths)), dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        given = body(input_ids=ids, position_ids=positions, conversation_lengths=lengths, use_cache=False)
    given.last_hidden_state.sum().backward()
