"""Memory of a process, part by part, under each strategy.

What is sharded by which stage: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models" (arXiv 1910.02054), section 5 and figure 1: of 16 bytes for a parameter in mixed precision, 2 are
the weight, 2 its gradient, 12 the optimizer's (fp32 weight and Adam's two moments). EleutherAI's "Transformer Math
101" (2023) has the same figures. Offload: Ren et al. 2021, "ZeRO-Offload" (arXiv 2101.06840). What this project's
training adds to the paper is said where it is added. All sizes are bytes of the largest process.
"""

from dataclasses import dataclass

from minisft.planning.model_cost import ModelCost
from minisft.recipe import LoraRecipe
from minisft.training.device import keeps_freed_memory
from minisft.training.loss import chunk_length

ZERO = ("zero1", "zero2", "zero3")
# DeepSpeed's default: gradients are reduced in buckets of at most so many elements, allocated whole on a GPU.
BUCKET = 500_000_000
# DeepSpeed's stage3_max_live_parameters and stage3_prefetch_bucket_size: gathered weights that are held at once.
LIVE, PREFETCH = 1_000_000_000, 50_000_000
_BROADCAST = 250 * 2.0**20  # DistributedDataParallel's broadcast_bucket_size
_NF4_BYTES = 0.516  # 4 bits and the doubly quantised scales: Dettmers et al. 2023 (arXiv 2305.14314), section 3


@dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as memory depends on it."""

    strategy: str
    processes: int
    half: bool
    on_cpu: bool
    checkpointing: bool = False
    offload: bool = False
    lora: LoraRecipe | None = None
    optimizer_bytes: int = 8  # for each trained parameter: of Adam's two moments

    def __post_init__(self) -> None:
        assert self.strategy in ("vanilla", *ZERO)
        assert not (self.offload and self.strategy == "vanilla"), "offload is DeepSpeed's"


@dataclass(frozen=True)
class Memory:
    """Bytes of the largest process.

    `peak` is less than the sum of the parts where some are never there together.

    Attributes:
        parameters: weights, and those gathered or cast for a forward.
        gradients: of the step.
        optimizer: fp32 weights where they are kept apart, and the optimizer's states.
        activations: kept for the backward, of the heaviest row.
        logits: of its supervised tokens, and what is made of them.
        buffers: for communication.
        workspace: temporaries of the backward, and on a CPU blocks that the allocator keeps.
        host: in the host's memory, with offload.
        peak: most of all at once, of the device.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    workspace: float
    host: float
    peak: float


def model_states(cost: ModelCost, setting: Setting) -> tuple[float, float, float]:
    """Return bytes of weights, gradients and optimizer states, before anything is gathered or offloaded.

    Vanilla keeps fp32 weights whatever the arithmetic, so 4 + 4 + 8; ZeRO in half precision 2 + 2 + 12, sharded by
    stage; ZeRO in fp32 keeps its fp32 copy all the same, 4 + 4 + 12. Frozen weights are in the arithmetic's format.
    Another optimizer than Adam keeps another number of bytes in place of the 8.
    """
    trained, frozen = cost.trainable, cost.parameters - cost.trainable
    zero = setting.strategy in ZERO
    width = 2 if zero and setting.half else 4
    frozen_width = _NF4_BYTES if setting.lora and setting.lora.load_in_4bit else (2 if setting.half else 4)
    weights = width * trained + frozen_width * frozen
    gradients = width * trained
    optimizer = (setting.optimizer_bytes + (4 if zero else 0)) * trained
    shards = setting.processes
    return (
        weights / (shards if setting.strategy == "zero3" else 1),
        gradients / (shards if setting.strategy in ("zero2", "zero3") else 1),
        optimizer / (shards if zero else 1),
    )


def memory_of(cost: ModelCost, setting: Setting, row: tuple[int, int], most_rows: int) -> Memory:
    """Add up the memory of the largest process.

    Args:
        cost: of the model, for the setting's arithmetic.
        setting: strategy, processes and so on.
        row: tokens and supervised tokens of the heaviest row.
        most_rows: of a step; from the second on, gradients are there before the backward begins.
    """
    weights, gradients, optimizer = model_states(cost, setting)
    gathered, buffers = _gathered(cost, setting), _buffers(cost, setting)
    activations = row[0] * token_bytes(cost, setting)
    logits = logit_bytes(cost, setting, row[1])
    workspace = _workspace(cost, setting)
    host = 0.0
    if setting.offload:
        host, optimizer = optimizer + 2 * gradients, 0.0
        gradients = 0.0
    forward = activations + logits + cost.constant_bytes
    grown = gradients if most_rows > 1 or _keeps_freed(setting) else 0.0
    at_step = gradients + max(_step_copy(cost, setting), _scattered(cost, setting))
    # Freed blocks are reused, by a GPU's caching allocator, or go back to the kernel. Not so under vanilla on a CPU:
    # there glibc is told to keep them, and mostly finds no fitting hole.
    busiest = grown + forward if _keeps_freed(setting) else max(grown + forward, at_step)
    return Memory(
        parameters=weights + gathered + cost.constant_bytes, gradients=gradients, optimizer=optimizer,
        activations=activations, logits=logits, buffers=buffers, workspace=workspace, host=host,
        peak=weights + gathered + optimizer + buffers + busiest + workspace,
    )  # fmt: skip


def token_bytes(cost: ModelCost, setting: Setting) -> float:
    """Bytes of a row for each token, logits apart: what the backward needs, and the holes that LoRA leaves on a CPU.

    There, LoRA took more by about two outputs of every layer that has adapters (40M and 135M parameters, one and two
    processes). Autograd does not keep them; glibc's heap seems to, since a small tensor that is kept, the adapter's
    inner one, comes to lie where a large one was freed.
    """
    holes = 0.0
    if setting.on_cpu and setting.lora:
        holes = 2 * 4 * cost.adapted_width / (cost.layers if setting.checkpointing else 1)
    return cost.kept_bytes(setting.checkpointing) + holes


def logit_bytes(cost: ModelCost, setting: Setting, supervised: int) -> float:
    """Bytes of the logits of a row's supervised tokens, and of what is made of them.

    `training.head` has those of a chunk at once: in fp32 they turn into their own gradient in place, in half precision
    that and the products are there besides, 8 bytes. The gradients by the hidden states are kept until the backward.
    """
    chunk = min(supervised, chunk_length(cost.vocabulary, setting.on_cpu))
    return supervised * kept_logit_bytes(cost, setting) + (
        0.0 if cost.all_logits else chunk * cost.vocabulary * (8 if setting.half else 4)
    )


def kept_logit_bytes(cost: ModelCost, setting: Setting) -> float:
    """Bytes that grow with the supervised tokens of a row, for each.

    All logits at the worst moment: log-probabilities and two gradients, in fp32. Before it, in half precision: the
    logit itself, its fp32 copy and the log-probability, 10 bytes. Where freed memory is kept, the logit is there too.
    """
    if cost.all_logits:
        return cost.vocabulary * (16 if _keeps_freed(setting) else 12)
    return cost.hidden_size * (2 if setting.half else 4)


def _keeps_freed(setting: Setting) -> bool:
    return setting.on_cpu and keeps_freed_memory(setting.strategy, half=setting.half)


def _gathered(cost: ModelCost, setting: Setting) -> float:
    """ZeRO-3's whole weights, and the flat buffer in which a group of them arrives before it is laid apart.

    One process has nothing to gather (DeepSpeed's NoGatherHandle), but on a CPU it was measured to hold what it trains
    once more, for 40M, 135M and 360M parameters, and nothing more with LoRA.
    """
    if setting.strategy != "zero3":
        return 0.0
    if setting.processes == 1:
        return 4.0 * min(cost.trainable, LIVE) if setting.on_cpu else 0.0
    elements = min(cost.parameters, LIVE) + min(cost.parameters, PREFETCH)
    return elements * (2 if setting.half else 4)


def _buffers(cost: ModelCost, setting: Setting) -> float:
    """DDP's buckets hold every gradient a second time; DeepSpeed's one bucket, on a CPU as far as it is filled.

    DDP begins with a broadcast of all weights, 250 MiB at a time; the buckets come after it, in the same memory.
    """
    if setting.strategy == "vanilla":
        broadcast = min(4.0 * cost.parameters, _BROADCAST) if _keeps_freed(setting) else 0.0
        return max(4.0 * cost.trainable, broadcast) if setting.processes > 1 else 0.0
    elements = min(BUCKET, cost.trainable) if setting.on_cpu else BUCKET
    return elements * (2 if setting.half else 4)


def _step_copy(cost: ModelCost, setting: Setting) -> float:
    """ZeRO's step has its shard of the gradients a second time, in fp32 and in one piece."""
    if setting.strategy not in ZERO or setting.offload:
        return 0.0
    return 4.0 * cost.trainable / setting.processes


def _scattered(cost: ModelCost, setting: Setting) -> float:
    """ZeRO-3 scatters a bucket's gradients from a copy of them in the processes' order; gloo clones that once more."""
    if setting.strategy != "zero3":
        return 0.0
    copies = 2 if setting.on_cpu else 1
    return copies * min(BUCKET, cost.trainable) * (2.0 if setting.half else 4.0)


# glibc keeps 64 MB at its heap's end (mallopt(3): twice the largest M_MMAP_THRESHOLD); the first step imports 35 MB.
_ON_A_CPU = 0.1e9


def _workspace(cost: ModelCost, setting: Setting) -> float:
    """A gradient before it is added to the others; tied embeddings have two beside their sum."""
    largest = 4.0 * cost.largest * (2 if cost.tied else 1)
    return largest + (_ON_A_CPU if setting.on_cpu else 0.0)
