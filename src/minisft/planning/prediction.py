"""One prediction: memory and time of a recipe on a machine under one strategy.

Training takes about 6 operations for a parameter and token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1); here
they are counted exactly. Their rate is defined as in model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", arXiv
2204.02311, appendix B). Traffic follows Rajbhandari et al. 2020 (arXiv 1910.02054), section 7, with the differences of
DeepSpeed's implementation.
"""

from dataclasses import asdict, dataclass
from typing import Any

from minisft.planning.machines import Machine
from minisft.planning.memory import LIVE, ZERO, Memory, Setting, memory_of
from minisft.planning.model_cost import ModelCost, ModelCosts, PrecisionMode
from minisft.planning.workload import Workload
from minisft.recipe import LoraRecipe
from minisft.training.master_weights import uses_masters

# Bytes that an update reads and writes for each trained parameter. AdamW reads weight, gradient and two moments, and
# writes three of them; clipping reads the gradients, then scales them.
_ADAM_BYTES, _CLIP_BYTES = 28, 12
_ZERO_COPY_BYTES = 24  # ZeRO copies a gradient into the bucket, into the shard, and into the flat fp32 shard
_OVERLAP = 0.5  # share of the products' time in which DDP sends: it sends during the backward, two thirds of that time
# Bytes that a process on a CPU holds after the imports, and the additional bytes of DeepSpeed: measured
# (benchmarks/plan.py, `process`). They are not in a GPU's memory.
_PROCESS_BYTES, _DEEPSPEED_BYTES = 0.46e9, 0.03e9
_DISK_BYTES_PER_SECOND = 0.5e9  # at which checkpoints are written
# Share of a GPU's usable memory above which a model that scores checkpoints is divided: 0.8 of all memory.
_SCORED_SHARE = 0.87


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step of the busiest process.

    Attributes:
        products: Seconds of forward and backward.
        update: Seconds of clipping and of the optimizer.
        communication: Seconds of communication that do not overlap with the products.
        offload: Seconds of moving gradients to the host and weights back, and of the update on the host.
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
    update_bytes = (_ADAM_BYTES + _CLIP_BYTES + (_ZERO_COPY_BYTES if shards > 1 else 0)) * cost.trainable / shards
    link = machine.link if nodes == 1 else min(machine.link, machine.network)
    communication = traffic(cost, setting, workload.rows) / link
    if setting.strategy == "vanilla" and machine.kind == "gpu":
        communication = max(0.0, communication - _OVERLAP * products)
    if not setting.offload:
        return StepTime(products, update_bytes / machine.bandwidth, communication, 0.0)
    over_bus = (2 if setting.half else 4) * cost.trainable * (1 + workload.rows) / shards / machine.host_link
    return StepTime(products, 0.0, communication, over_bus + update_bytes / machine.host_bandwidth)


def products_seconds(cost: ModelCost, setting: Setting, machine: Machine, workload: Workload, precision: str) -> float:
    """Return the seconds of a mean step's forward and backward on its busiest process."""
    operations = (
        workload.busiest_tokens * cost.step_flops(setting.checkpointing)
        + cost.head_flops(workload.busiest_supervised)
        + cost.attention_flops(workload.busiest_squares, setting.checkpointing)
    )
    return operations / (machine.flops[precision] * machine.utilisation)


def traffic(cost: ModelCost, setting: Setting, rows: float) -> float:
    """Return the bytes that a process sends in a step, as `training.communication` counts them in `metrics.jsonl`.

    With N processes, gathering or scattering a tensor of S bytes sends (N-1)/N S, and all-reducing it twice that.
    Vanilla all-reduces the gradients once a step. DeepSpeed all-reduces them too, where the paper's ZeRO-1 and
    ZeRO-2 reduce-scatter: ZeRO-1 once a step, ZeRO-2 for every row; then both gather the weights. ZeRO-3 scatters
    the gradients of every row and gathers the weights for the row's forward. It gathers them again for the backward
    where they are more than DeepSpeed keeps gathered (`LIVE`).
    """
    share = (setting.processes - 1) / setting.processes
    gradients, weights = (setting.weight_bytes * count for count in (cost.trainable, cost.parameters))
    if setting.strategy == "vanilla":
        return share * 2 * gradients
    if setting.strategy == "zero1":
        return share * 3 * gradients
    if setting.strategy == "zero2":
        return share * (2 * rows + 1) * gradients
    gathers = 1 if cost.parameters <= LIVE else 2
    return share * rows * (gradients + gathers * weights)


@dataclass(frozen=True)
class Job:
    """What is planned, independently of the strategy: a model, a machine and the work.

    Attributes:
        model: Costs of the model.
        machine: Hardware of each process.
        processes: Number of processes over all nodes.
        nodes: Number of nodes.
        precision: fp32, bf16 or fp16.
        workload: The work of the run.
        row_tokens: Largest number of tokens of a row.
        optimizer_bytes: Bytes of optimizer state for each trained parameter.
        sequence_parallel: Number of processes that share the tokens of a row; the rows of `workload` are their parts.
        scored_tokens: Tokens of the longest prompt and answer, where checkpoints are scored during training; else 0.
    """

    model: ModelCosts
    machine: Machine
    processes: int
    nodes: int
    precision: str
    workload: Workload
    row_tokens: int
    optimizer_bytes: int = 8
    sequence_parallel: int = 1
    scored_tokens: int = 0

    def cost(self, strategy: str, lora: LoraRecipe | None) -> ModelCost:
        """Return the model's cost in the precision that the strategy trains in: half, autocast or fp32."""
        masters = strategy != "vanilla" or uses_masters(strategy, self.precision, lora=lora is not None)
        mode: PrecisionMode = "half" if masters else "autocast"
        return self.model.of("fp32" if self.precision == "fp32" else mode, lora)

    def gpus_of_scored_model(self, parameters: int) -> int:
        """Return how many GPUs share the model that scores checkpoints, as `evaluation.placement.gpus_for` does."""
        count = 1
        if self.machine.kind == "gpu":
            weights = (4 if self.precision == "fp32" else 2) * parameters
            while 2 * count <= self.processes // self.nodes and weights > _SCORED_SHARE * count * self.machine.memory:
                count *= 2
        return count


@dataclass(frozen=True)
class Prediction:
    """What a job needs under one setting. Bytes are those of the largest process, seconds those of the busiest one.

    Attributes:
        setting: Strategy and the other choices on which memory depends.
        memory: Memory by its parts.
        process_bytes: Memory of a CPU process before it loads the model; 0 on a GPU.
        usable_bytes: Memory that a process may use.
        step: Time of a mean step.
        traffic_bytes: Bytes that a process sends in a step.
        steps: Number of steps of the run; None where the data is unknown.
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
        """Return the prediction as plain numbers."""
        hidden = ("half", "bf16", "on_cpu", "scored_tokens", "gpus_each")
        settings = {key: value for key, value in asdict(self.setting).items() if key not in hidden}
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
        job: Model, machine and work.
        strategy: vanilla, zero1, zero2 or zero3.
        checkpointing: True with gradient checkpointing.
        offload: True where the optimizer is offloaded to the host.
        lora: The adapters; None trains all weights.
        row: Tokens and supervised tokens of the heaviest row; None means the workload's heaviest row.
    """
    # 1. The setting, and the model's cost in its precision.
    machine, workload = job.machine, job.workload
    cost = job.cost(strategy, lora)
    setting = Setting(
        strategy=strategy, processes=job.processes, half=job.precision != "fp32", on_cpu=machine.kind == "cpu",
        checkpointing=checkpointing, offload=offload, lora=lora, optimizer_bytes=job.optimizer_bytes,
        bf16=job.precision == "bf16", scored_tokens=job.scored_tokens,
        gpus_each=job.gpus_of_scored_model(cost.parameters),
    )  # fmt: skip
    # 2. Memory of the largest process.
    if row is None:
        row = workload.heaviest_row(cost.kept_bytes(checkpointing), 12.0 * cost.vocabulary)
    memory = memory_of(cost, setting, row, workload.most_rows)
    process_bytes = 0.0
    if setting.on_cpu:
        process_bytes = _PROCESS_BYTES + (_DEEPSPEED_BYTES if strategy != "vanilla" else 0.0)
    # 3. Time of a step, and of the run with its checkpoints.
    step = step_time(cost, setting, machine, workload, nodes=job.nodes, precision=job.precision)
    total_seconds = None
    if workload.steps is not None:
        checkpoint_bytes = 4 * cost.parameters + 8 * cost.trainable
        writing = workload.checkpoints * checkpoint_bytes / _DISK_BYTES_PER_SECOND
        total_seconds = workload.steps * step.total + writing
    return Prediction(
        setting=setting,
        memory=memory,
        process_bytes=process_bytes,
        usable_bytes=machine.memory,
        step=step,
        traffic_bytes=traffic(cost, setting, workload.rows),
        steps=workload.steps,
        total_seconds=total_seconds,
    )
