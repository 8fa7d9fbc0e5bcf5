"""Time of a step: operations counted, at the rate a machine reaches; bytes moved and sent, at its speeds.

Operations: 6 for a parameter and token in training (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), here counted
exactly; the rate as in model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, appendix B).
Traffic: Rajbhandari et al. 2020 (arXiv 1910.02054), section 7, and what DeepSpeed does beyond it.
"""

from dataclasses import dataclass

from minisft.planning.footprint import Footprint
from minisft.planning.machines import Machine
from minisft.planning.memory import LIVE, ZERO, Setting
from minisft.planning.workload import Workload

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
    footprint: Footprint, setting: Setting, machine: Machine, workload: Workload, *, nodes: int, precision: str
) -> StepTime:
    """Predict the time of a mean step."""
    products = products_seconds(footprint, setting, machine, workload, precision)
    shards = setting.processes if setting.strategy in ZERO else 1
    moved = (_ADAM_BYTES + _CLIP_BYTES + (_ZERO_COPY_BYTES if shards > 1 else 0)) * footprint.trainable / shards
    link = machine.link if nodes == 1 else min(machine.link, machine.network)
    sent = traffic(footprint, setting, workload.rows) / link
    if setting.strategy == "vanilla" and machine.kind == "gpu":
        sent = max(0.0, sent - _OVERLAP * products)
    update = moved / machine.bandwidth
    if not setting.offload:
        return StepTime(products, update, sent, 0.0)
    over_bus = (2 if setting.half else 4) * footprint.trainable * (1 + workload.rows) / shards / machine.host_link
    return StepTime(products, 0.0, sent, over_bus + moved / machine.host_bandwidth)


def products_seconds(
    footprint: Footprint, setting: Setting, machine: Machine, workload: Workload, precision: str
) -> float:
    operations = (
        workload.busiest_tokens * footprint.step_flops(setting.checkpointing)
        + footprint.head_flops(workload.busiest_supervised)
        + footprint.attention_flops(workload.busiest_squares, setting.checkpointing)
    )
    return operations / (machine.flops[precision] * machine.utilisation)


def traffic(footprint: Footprint, setting: Setting, rows: float) -> float:
    """Bytes that a process sends in a step, as `training.communication` counts them in `metrics.jsonl`.

    With N processes, a whole of S bytes is gathered or scattered for (N-1)/N S and all-reduced for twice that.
    Vanilla all-reduces the gradients once a step. DeepSpeed all-reduces them too, where the paper's ZeRO-1 and
    ZeRO-2 reduce-scatter: ZeRO-1 once a step, ZeRO-2 for every row; then both gather the weights. ZeRO-3 scatters
    the gradients of every row and gathers the weights for its forward, and again for its backward where they are
    more than stay gathered.
    """
    share = (setting.processes - 1) / setting.processes
    width = 2 if setting.half and setting.strategy in ZERO else 4
    gradients, weights = width * footprint.trainable, width * footprint.parameters
    if setting.strategy == "vanilla":
        return share * 2 * gradients
    if setting.strategy == "zero1":
        return share * 3 * gradients
    if setting.strategy == "zero2":
        return share * (2 * rows + 1) * gradients
    gathers = 1 if footprint.parameters <= LIVE else 2
    return share * rows * (gradients + gathers * weights)
