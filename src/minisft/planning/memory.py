"""Memory of a process, part by part, under each strategy.

What is sharded by which stage: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models" (arXiv 1910.02054), section 5 and figure 1: of 16 bytes for a parameter in mixed precision, 2 are
the weight, 2 its gradient, 12 the optimizer's (fp32 weight and Adam's two moments). EleutherAI's "Transformer Math
101" (2023) has the same figures. Offload: Ren et al. 2021, "ZeRO-Offload" (arXiv 2101.06840). Each function states
what this project's training adds to the papers. All sizes are bytes of the largest process.
"""

from dataclasses import dataclass

from minisft.planning.model_cost import ModelCost
from minisft.recipe import LoraRecipe
from minisft.training.device import keeps_freed_memory
from minisft.training.loss import chunk_length
from minisft.training.master_weights import uses_masters

ZERO = ("zero1", "zero2", "zero3")
# Elements of a bucket in which DeepSpeed reduces gradients, its default; a GPU allocates the full bucket at once.
BUCKET = 500_000_000
# Elements of gathered weights that are held at once: DeepSpeed's stage3_max_live_parameters and
# stage3_prefetch_bucket_size.
LIVE, PREFETCH = 1_000_000_000, 50_000_000
_BROADCAST_BYTES = 250 * 2.0**20  # DistributedDataParallel's broadcast_bucket_size
# Bytes of a weight: 4 bits and the doubly quantised scales (Dettmers et al. 2023, arXiv 2305.14314, section 3).
_NF4_BYTES = 0.516
# glibc keeps 64 MB at the end of its heap (mallopt(3): twice the largest M_MMAP_THRESHOLD), and the first step imports
# 35 MB of code.
_CPU_WORKSPACE_BYTES = 0.1e9


@dataclass(frozen=True)
class Setting:
    """The choices on which the memory of training depends.

    Attributes:
        strategy: vanilla, zero1, zero2 or zero3.
        processes: Number of processes over all nodes.
        half: True for bf16 or fp16 arithmetic, False for fp32.
        on_cpu: True where the processes train on a CPU.
        checkpointing: True with gradient checkpointing.
        offload: True where the optimizer is offloaded to the host.
        lora: The adapters; None trains all weights.
        optimizer_bytes: Bytes of optimizer state for each trained parameter; 8 are Adam's two moments.
        bf16: True where the half precision is bf16.
        scored_tokens: Tokens of the longest prompt and answer, where checkpoints are scored during training; else 0.
        gpus_each: Number of GPUs that share the model that is scored.
    """

    strategy: str
    processes: int
    half: bool
    on_cpu: bool
    checkpointing: bool = False
    offload: bool = False
    lora: LoraRecipe | None = None
    optimizer_bytes: int = 8
    bf16: bool = False
    scored_tokens: int = 0
    gpus_each: int = 1

    def __post_init__(self) -> None:
        assert self.half or not self.bf16
        assert self.strategy in ("vanilla", *ZERO)
        assert not (self.offload and self.strategy == "vanilla"), "only DeepSpeed offloads"

    @property
    def masters(self) -> bool:
        """Whether the trained weights are in half precision, with fp32 weights in the optimizer."""
        if self.strategy in ZERO:
            return self.half
        return uses_masters(self.strategy, "bf16" if self.bf16 else "", lora=self.lora is not None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a trained weight, and of a gradient that is sent."""
        return 2 if self.masters else 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the sum of the gradients of a step's rows: fp32 in bf16, but for ZeRO-1."""
        return 4 if self.bf16 and self.strategy != "zero1" else self.weight_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of the largest process.

    `peak` is less than the sum of the parts where some of them are never allocated at the same time.

    Attributes:
        parameters: Weights, and the copies that are gathered or cast for a forward.
        gradients: Gradients of the step.
        optimizer: The optimizer's states, and the fp32 master weights where they are separate.
        activations: Activations of the heaviest row that are kept for the backward.
        logits: Logits of the heaviest row's supervised tokens, and the tensors computed from them.
        buffers: Communication buffers.
        workspace: Temporary tensors of the backward, and on a CPU the blocks that the allocator keeps.
        scoring: The second model, by which checkpoints are scored between steps, and its cache for one row.
        host: Memory of the host that offload needs.
        peak: Largest memory of the device at any moment.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    workspace: float
    scoring: float
    host: float
    peak: float


def model_states(cost: ModelCost, setting: Setting) -> tuple[float, float, float]:
    """Return bytes of weights, gradients and optimizer states, before anything is gathered or offloaded.

    Vanilla in fp32 and fp16 keeps fp32 weights, so 4 + 4 + 8 bytes a parameter, and in bf16 fp32 masters and sums of
    gradients too, 2 + 4 + 12; ZeRO in half precision 2 + 2 + 12, sharded by stage, and in bf16 from stage 2 on
    2 + 4 + 12; ZeRO in fp32 keeps an fp32 copy too, 4 + 4 + 12. Frozen weights have the precision of the arithmetic. An
    optimizer other than Adam has `optimizer_bytes` in place of the 8.
    """
    trained, frozen = cost.trainable, cost.parameters - cost.trainable
    zero = setting.strategy in ZERO
    frozen_width = _NF4_BYTES if setting.lora and setting.lora.load_in_4bit else (2 if setting.half else 4)
    weights = setting.weight_bytes * trained + frozen_width * frozen
    gradients = setting.gradient_bytes * trained
    optimizer = (setting.optimizer_bytes + (4 if zero or setting.masters else 0)) * trained
    shards = setting.processes
    return (
        weights / (shards if setting.strategy == "zero3" else 1),
        gradients / (shards if setting.strategy in ("zero2", "zero3") else 1),
        optimizer / (shards if zero else 1),
    )


def memory_of(cost: ModelCost, setting: Setting, row: tuple[int, int], most_rows: int) -> Memory:
    """Add up the memory of the largest process.

    Args:
        cost: Cost of the model, counted in the setting's precision.
        setting: Strategy, processes and the other choices.
        row: Tokens and supervised tokens of the heaviest row.
        most_rows: Largest number of rows of a step; from the second row on, gradients exist before the backward.
    """
    # 1. What is allocated throughout the step.
    weights, gradients, optimizer = model_states(cost, setting)
    gathered, buffers = _gathered_weights(cost, setting), _communication_buffers(cost, setting)
    host = 0.0
    if setting.offload:
        host, optimizer = optimizer + 2 * gradients, 0.0
        gradients = 0.0
    # 2. A gradient before it is added to the others; tied embeddings have two beside their sum.
    workspace = 4.0 * cost.largest * (2 if cost.tied else 1) + (_CPU_WORKSPACE_BYTES if setting.on_cpu else 0.0)
    # 3. At the end of the heaviest row's forward.
    activations = row[0] * token_bytes(cost, setting)
    logits = logit_bytes(cost, setting, row[1])
    forward = activations + logits + cost.constant_bytes
    earlier_gradients = gradients if most_rows > 1 or _keeps_freed(setting) else 0.0
    # 4. At the update: ZeRO copies its shard of the gradients to fp32 in one piece. ZeRO-3 scatters a bucket's
    # gradients from a copy in the order of the processes, and gloo clones that copy.
    shard_copy = scatter_copies = 0.0
    if setting.strategy in ZERO and not setting.offload:
        shard_copy = 4.0 * cost.trainable / setting.processes
    if setting.strategy == "zero3":
        copies = 2 if setting.on_cpu else 1
        scatter_copies = copies * min(BUCKET, cost.trainable) * (2.0 if setting.half else 4.0)
    at_update = gradients + max(shard_copy, scatter_copies)
    # 5. The larger of the two moments. Freed blocks are reused by a GPU's caching allocator, or are returned to the
    # kernel. Vanilla on a CPU differs: it sets glibc to keep freed blocks, and new tensors rarely fit into them.
    busiest = earlier_gradients + forward
    if not _keeps_freed(setting):
        busiest = max(busiest, at_update)
    peak = weights + gathered + optimizer + buffers + busiest + workspace
    # 6. A checkpoint is scored between steps, when gradients and activations are freed.
    scoring = scoring_bytes(cost, setting)
    peak = peak + scoring if _keeps_freed(setting) else max(peak, weights + optimizer + buffers + scoring)
    return Memory(
        parameters=weights + gathered + cost.constant_bytes, gradients=gradients, optimizer=optimizer,
        activations=activations, logits=logits, buffers=buffers, workspace=workspace, scoring=scoring, host=host,
        peak=peak,
    )  # fmt: skip


def scoring_bytes(cost: ModelCost, setting: Setting) -> float:
    """Return the bytes of the model that scores a checkpoint during training, and of its cache for one row.

    It is loaded beside the model that trains (`evaluation.checkpoint_scorer`), in half precision on a GPU unless the
    training is in fp32, and on a CPU in fp32. One row is the smallest batch; larger ones are halved if memory runs out.
    """
    if not setting.scored_tokens:
        return 0.0
    width = 2 if setting.half and not setting.on_cpu else 4
    return float(width * (cost.parameters + setting.scored_tokens * cost.cache_width)) / setting.gpus_each


def token_bytes(cost: ModelCost, setting: Setting) -> float:
    """Return the bytes of a row for each token, without logits: the activations, and LoRA's fragmentation on a CPU.

    On a CPU, LoRA was measured to need about two more outputs of every layer that has adapters (40M and 135M
    parameters, one and two processes). Autograd does not keep them; glibc's heap seems to, since it places a small
    tensor that is kept, the adapter's inner activation, in the block of a large tensor that was freed.
    """
    fragmentation = 0.0
    if setting.on_cpu and setting.lora:
        fragmentation = 2 * 4 * cost.adapted_width / (cost.layers if setting.checkpointing else 1)
    return cost.kept_bytes(setting.checkpointing) + fragmentation


def logit_bytes(cost: ModelCost, setting: Setting, supervised: int) -> float:
    """Return the bytes of the logits of a row's supervised tokens, and of the tensors computed from them.

    `training.loss` holds the logits of one chunk at a time. In fp32 they are overwritten by their own gradient; in
    half precision the gradient and the products exist beside them, 8 bytes. The gradients with respect to the hidden
    states are kept until the backward.
    """
    chunk = min(supervised, chunk_length(cost.vocabulary, setting.on_cpu))
    return supervised * kept_logit_bytes(cost, setting) + (
        0.0 if cost.all_logits else chunk * cost.vocabulary * (8 if setting.half else 4)
    )


def kept_logit_bytes(cost: ModelCost, setting: Setting) -> float:
    """Return the bytes for each supervised token of a row, beyond those of a chunk.

    Where all logits exist at once, the peak is log-probabilities and two gradients, all in fp32: 12 bytes a logit. The
    moment before, in half precision, has the logit, its fp32 copy and the log-probability, 10 bytes. Where freed
    memory is kept, the logit is still allocated at the peak.
    """
    if cost.all_logits:
        return cost.vocabulary * (16 if _keeps_freed(setting) else 12)
    return cost.hidden_size * (2 if setting.half else 4)


def _keeps_freed(setting: Setting) -> bool:
    return setting.on_cpu and keeps_freed_memory(setting.strategy, half=setting.half)


def _gathered_weights(cost: ModelCost, setting: Setting) -> float:
    """Return the bytes of ZeRO-3's gathered weights, and of the flat buffer that receives a group of them.

    A single process has nothing to gather (DeepSpeed's NoGatherHandle), but on a CPU it was measured to hold the
    trained weights a second time, for 40M, 135M and 360M parameters, and nothing more with LoRA.
    """
    if setting.strategy != "zero3":
        return 0.0
    if setting.processes == 1:
        return 4.0 * min(cost.trainable, LIVE) if setting.on_cpu else 0.0
    elements = min(cost.parameters, LIVE) + min(cost.parameters, PREFETCH)
    return elements * (2 if setting.half else 4)


def _communication_buffers(cost: ModelCost, setting: Setting) -> float:
    """Return the bytes of the communication buffers.

    DDP's buckets hold every gradient a second time, in the format in which it is sent; DeepSpeed has a single bucket,
    of which a CPU allocates only the part that is filled, and ZeRO-2 a second one on a GPU, where it fills one while it
    reduces the other (stage_1_and_2.py, `setup_buckets`, with `overlap_comm`). DDP starts with a broadcast of all
    weights, 250 MiB at a time, and allocates the buckets afterwards, in the same memory.
    """
    if setting.strategy == "vanilla":
        broadcast = min(4.0 * cost.parameters, _BROADCAST_BYTES) if _keeps_freed(setting) else 0.0
        return max(float(setting.weight_bytes) * cost.trainable, broadcast) if setting.processes > 1 else 0.0
    buckets = 2 if setting.strategy == "zero2" else 1
    elements = min(BUCKET, cost.trainable) if setting.on_cpu else buckets * BUCKET
    return elements * (2 if setting.half else 4)
