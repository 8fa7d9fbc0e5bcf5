"""One prediction: memory and time of a recipe on a machine under one strategy.

Operations: 6 for a parameter and token in training (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), here counted
exactly; the rate as in model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, appendix B).
Traffic: Rajbhandari et al. 2020 (arXiv 1910.02054), section 7, and what DeepSpeed does beyond it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from minisft.planning.machines import Machine
from minisft.planning.memory import LIVE, ZERO, Memory, Setting, memory_of
from minisft.planning.model_cost import ModelCost, ModelCosts, PrecisionMode
from minisft.planning.workload import Workload
from minisft.recipe import LoraRecipe

# AdamW reads weight, gradient and two moments and writes three of them; clipping reads gradients, then scales them.
_ADAM_BYTES, _CLIP_BYTES = 28, 12
_ZERO_COPY_BYTES = 24  # into the bucket, into the shard, into the flat fp32 shard
_OVERLAP = 0.5  # DDP sends while the backward, two thirds of the products, goes on


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step of the busiest process.

    Attributes:
        products: forward and backward.
        update: clipping and the optimizer.
        communication: what is not hidden behind the products.
        offload: moving gradients to the host and weights back, and the update there.
    """

    products: float
    update: float
    communication: float
    offload: float

    @property
    def total(self) -> float:
        return self.products + self.update + self.communication + self.offload


def step_time(
    cost: ModelCost, setting: Setting, machine: Machine, workload: Workload, *, nodes: int, precision: str
) -> StepTime:
    """Predict the time of a mean step."""
    products = products_seconds(cost, setting, machine, workload, precision)
    shards = setting.processes if setting.strategy in ZERO else 1
    moved = (_ADAM_BYTES + _CLIP_BYTES + (_ZERO_COPY_BYTES if shards > 1 else 0)) * cost.trainable / shards
    link = machine.link if nodes == 1 else min(machine.link, machine.network)
    sent = traffic(cost, setting, workload.rows) / link
    if setting.strategy == "vanilla" and machine.kind == "gpu":
        sent = max(0.0, sent - _OVERLAP * products)
    update = moved / machine.bandwidth
    if not setting.offload:
        return StepTime(products, update, sent, 0.0)
    over_bus = (2 if setting.half else 4) * cost.trainable * (1 + workload.rows) / shards / machine.host_link
    return StepTime(products, 0.0, sent, over_bus + moved / machine.host_bandwidth)


def products_seconds(cost: ModelCost, setting: Setting, machine: Machine, workload: Workload, precision: str) -> float:
    operations = (
        workload.busiest_tokens * cost.step_flops(setting.checkpointing)
        + cost.head_flops(workload.busiest_supervised)
        + cost.attention_flops(workload.busiest_squares, setting.checkpointing)
    )
    return operations / (machine.flops[precision] * machine.utilisation)


def traffic(cost: ModelCost, setting: Setting, rows: float) -> float:
    """Bytes that a process sends in a step, as `training.communication` counts them in `metrics.jsonl`.

    With N processes, a whole of S bytes is gathered or scattered for (N-1)/N S and all-reduced for twice that.
    Vanilla all-reduces the gradients once a step. DeepSpeed all-reduces them too, where the paper's ZeRO-1 and
    ZeRO-2 reduce-scatter: ZeRO-1 once a step, ZeRO-2 for every row; then both gather the weights. ZeRO-3 scatters
    the gradients of every row and gathers the weights for its forward, and again for its backward where they are
    more than stay gathered.
    """
    share = (setting.processes - 1) / setting.processes
    width = 2 if setting.half and setting.strategy in ZERO else 4
    gradients, weights = width * cost.trainable, width * cost.parameters
    if setting.strategy == "vanilla":
        return share * 2 * gradients
    if setting.strategy == "zero1":
        return share * 3 * gradients
    if setting.strategy == "zero2":
        return share * (2 * rows + 1) * gradients
    gathers = 1 if cost.parameters <= LIVE else 2
    return share * rows * (gradients + gathers * weights)


# Resident on a CPU after the imports, and more with DeepSpeed: measured (benchmarks/plan.py, `process`). A GPU's memory
# holds none of it.
_PROCESS_BYTES, _DEEPSPEED_BYTES = 0.46e9, 0.03e9
_DISK = 0.5e9  # bytes a second that checkpoints are written at


@dataclass(frozen=True)
class Job:
    """What is planned: a model, a machine and the work, whatever the strategy.

    Attributes:
        model: its footprints.
        machine: for each process.
        processes: over all nodes.
        nodes: of them.
        precision: fp32, bf16 or fp16.
        workload: of the run.
        row_tokens: tokens of a row at most.
        optimizer_bytes: that the optimizer keeps for each trained parameter.
    """

    model: ModelCosts
    machine: Machine
    processes: int
    nodes: int
    precision: str
    workload: Workload
    row_tokens: int
    optimizer_bytes: int = 8

    def cost(self, strategy: str, lora: LoraRecipe | None) -> ModelCost:
        mode: PrecisionMode = "half" if strategy != "vanilla" else "autocast"
        return self.model.of("fp32" if self.precision == "fp32" else mode, lora)


@dataclass(frozen=True)
class Prediction:
    """What a job needs under one setting. Bytes are of the largest process, seconds of the busiest one.

    Attributes:
        setting: strategy and what else memory depends on.
        memory: part by part.
        process_bytes: resident before the model, on a CPU.
        usable_bytes: that a process may use.
        step: a mean step's time.
        traffic_bytes: that a process sends in a step.
        steps: of the run; None where the data is not known.
        total_seconds: Time of all steps and checkpoints; None where the number of steps is unknown.
    """

    setting: Setting
    memory: Memory
    process_bytes: float
    usable_bytes: float
    step: StepTime
    traffic_bytes: float
    steps: int | None
    total_seconds: float | None

    @property
    def peak_memory_bytes(self) -> float:
        return self.memory.peak

    @property
    def step_seconds(self) -> float:
        return self.step.total

    @property
    def fits(self) -> bool:
        return self.memory.peak + self.process_bytes <= self.usable_bytes

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain numbers."""
        settings = {key: value for key, value in asdict(self.setting).items() if key not in ("half", "on_cpu")}
        return {
            **settings,
            "fits": self.fits,
            "memory_bytes": {key: round(value) for key, value in asdict(self.memory).items()},
            "process_bytes": round(self.process_bytes),
            "usable_bytes": round(self.usable_bytes),
            "traffic_bytes_per_step": round(self.traffic_bytes),
            "step_seconds": {**asdict(self.step), "total": self.step.total},
            "steps": self.steps,
            "total_seconds": self.total_seconds,
        }


def predict(
    job: Job,
    strategy: str,
    *,
    checkpointing: bool = False,
    offload: bool = False,
    lora: LoraRecipe | None = None,
    row: tuple[int, int] | None = None,
) -> Prediction:
    """Predict memory and time of a job under one setting.

    Args:
        job: model, machine and work.
        strategy: vanilla, zero1, zero2 or zero3.
        checkpointing: of gradients.
        offload: of the optimizer to the host.
        lora: adapters, or None to train all weights.
        row: tokens and supervised tokens of the heaviest row; None: the workload's.
    """
    machine, workload = job.machine, job.workload
    setting = Setting(
        strategy=strategy, processes=job.processes, half=job.precision != "fp32", on_cpu=machine.kind == "cpu",
        checkpointing=checkpointing, offload=offload, lora=lora, optimizer_bytes=job.optimizer_bytes,
    )  # fmt: skip
    cost = job.cost(strategy, lora)
    if row is None:
        row = workload.heaviest_row(cost.kept_bytes(checkpointing), 12.0 * cost.vocabulary)
    memory = memory_of(cost, setting, row, workload.most_rows)
    step = step_time(cost, setting, machine, workload, nodes=job.nodes, precision=job.precision)
    return Prediction(
        setting=setting,
        memory=memory,
        process_bytes=_process_bytes(setting),
        usable_bytes=machine.memory,
        step=step,
        traffic_bytes=traffic(cost, setting, workload.rows),
        steps=workload.steps,
        total_seconds=_total_seconds(step.total, workload, cost),
    )


def _total_seconds(step: float, workload: Workload, cost: ModelCost) -> float | None:
    if workload.steps is None:
        return None
    checkpoint = 4 * cost.parameters + 8 * cost.trainable
    return workload.steps * step + workload.checkpoints * checkpoint / _DISK


def _process_bytes(setting: Setting) -> float:
    if not setting.on_cpu:
        return 0.0
    return _PROCESS_BYTES + (_DEEPSPEED_BYTES if setting.strategy != "vanilla" else 0.0)
