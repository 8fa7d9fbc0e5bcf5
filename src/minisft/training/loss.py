"""The loss of supervised tokens, computed without all their logits at once.

Logits of a row are the largest tensor of training where the vocabulary is large: supervised tokens x vocabulary, three
or four times over. Here the output layer takes a chunk of positions at a time and turns its logits into losses and into
gradients while they are there, so memory does not grow with the row, and nothing is computed twice. The idea is that of
Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009) and of Liger's fused linear cross-entropy (Hsu et al. 2024,
arXiv 2410.10989), in plain torch.

Autograd makes a gradient of the embedding's size (vocabulary x hidden size) for every forward, mostly zeros: on a CPU
and with a large vocabulary that takes longer than several layers of a short row. Here the rows of a step leave the
gradients of what they looked up (tokens x hidden size) for the last one, whose backward adds all of them; or for one
before it, once they are as many as the embedding has rows, so that what waits never takes more memory than it saves.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding, linear

from minisft.training.batching import PackedRow

# Of an output layer: whether its model returns what it gives as it is.
_fusable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def row_loss(model: Any, row: PackedRow) -> torch.Tensor:
    """Return the sum of the cross-entropies of a row's supervised tokens, () in fp32.

    `logits_to_keep` takes the positions to predict at, and of these a chunk at a time has its logits, of shape (chunk,
    vocabulary). Models that change their logits afterwards (a scale, a soft cap) have (supervised, vocabulary) of them
    at once, and so has fp16, whose gradients of probabilities would vanish before the loss scale reaches them.
    """
    layer = output_layer(model)
    if layer is None or matmul_dtype(layer.weight) == torch.float16 or not _can_fuse(model, layer, row):
        return _loss_of_all_logits(model, row)
    with fused_loss_head(layer, row.targets):
        return _forward(model, row)[0, 0]


def _loss_of_all_logits(model: Any, row: PackedRow) -> torch.Tensor:
    logits = _forward(model, row)[0]
    if len(row.targets) == 0:  # a row without conversations, there for the collectives of its forward
        return logits.sum().float() * 0.0
    return cross_entropy(logits.float(), row.targets, reduction="sum")


def _forward(model: Any, row: PackedRow) -> Any:
    return model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        logits_to_keep=row.predict_at,
        conversation_lengths=row.lengths,
        use_cache=False,
    ).logits


def _can_fuse(model: Any, layer: nn.Linear, row: PackedRow) -> bool:
    """Find out on a row of one token, once for each model, without touching random states."""
    if layer not in _fusable:
        token, learned = row.input_ids[:, :1], model.training
        probe = PackedRow(token, torch.zeros_like(token), (1,), torch.zeros_like(token[0]), token[0], ())
        model.eval()
        with torch.no_grad():
            _fusable[layer] = returns_raw_logits(layer, lambda: _forward(model, probe))
        model.train(learned)
    return _fusable[layer]


# Logits of a chunk. On two cores 2^22 took 1.08 of the time of all logits at once, 2^24 0.89, 2^26 no less.
_CHUNK_ON_CPU, _CHUNK = 1 << 24, 1 << 27


def output_layer(model: Any) -> nn.Linear | None:
    """Return the layer that makes logits of hidden states; None where it is not a plain linear one without a bias."""
    layer = unwrapped(model).get_output_embeddings()
    return layer if type(layer) is nn.Linear and layer.bias is None else None


def unwrapped(model: Any) -> Any:
    """Return the model inside what DDP and DeepSpeed wrap around it."""
    while hasattr(model, "module"):
        model = model.module
    return model


def chunk_length(vocabulary: int, on_cpu: bool) -> int:
    """Return how many positions have their logits at once."""
    return max(1, (_CHUNK_ON_CPU if on_cpu else _CHUNK) // vocabulary)


@contextlib.contextmanager
def fused_loss_head(layer: nn.Linear, targets: torch.Tensor) -> Iterator[None]:
    """Let an output layer return (1, 1) the sum of the cross-entropies of `targets`, where it would return logits.

    Args:
        layer: it gets hidden states of shape (1, supervised, hidden size).
        targets: (supervised,) token ids.
    """
    with _replace_forward(layer, lambda hidden: fused_loss(hidden[0], layer.weight, targets).reshape(1, 1)):
        yield


def returns_raw_logits(layer: nn.Linear, forward: Callable[[], torch.Tensor]) -> bool:
    """Say whether a model returns what its output layer gives as it is: not scaled, capped or cut, in place or not.

    Args:
        layer: the model's output layer.
        forward: runs the model, and returns its logits.
    """
    given: list[torch.Tensor] = []

    def mark(hidden: torch.Tensor) -> torch.Tensor:
        given.append(torch.zeros((1, 1), device=hidden.device))
        return given[-1]

    with _replace_forward(layer, mark):
        logits = forward()
    if len(given) != 1 or logits.shape != (1, 1):
        return False
    memory = [tensor.untyped_storage()._cdata for tensor in (logits, given[0])]  # a wrapper may have made a view
    return memory[0] == memory[1] and logits._version == 0


@contextlib.contextmanager
def _replace_forward(layer: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del layer.forward


def fused_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropies, () in fp32, of logits `hidden @ weight.T` that are never there together.

    Args:
        hidden: (positions, hidden size).
        weight: (vocabulary, hidden size).
        targets: (positions,) token ids.
    """
    return _SumOfLosses.apply(  # type: ignore[no-any-return]
        hidden, weight, targets, matmul_dtype(weight), torch.is_grad_enabled()
    )


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return in which format a product with `weight` is computed, which autocast may have set."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _SumOfLosses(torch.autograd.Function):
    """Cross-entropy's gradient by the logits is softmax - onehot: forward has it at hand and multiplies it on."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, products: torch.dtype, learning: bool) -> Any:
        needs_hidden, needs_weight = (learning and needed for needed in ctx.needs_input_grad[:2])
        by_hidden = torch.zeros_like(hidden) if needs_hidden else None
        by_weight: torch.Tensor | None = None
        losses = torch.zeros(len(targets), device=hidden.device)
        length = chunk_length(len(weight), hidden.device.type == "cpu")
        with torch.autocast(hidden.device.type, enabled=False):
            states, factors = hidden.to(products), weight.to(products)
            for start in range(0, len(targets), length):
                part = slice(start, start + length)
                losses[part], gradient = _losses_and_gradient(linear(states[part], factors).float(), targets[part])
                gradient = gradient.to(products)
                if by_hidden is not None:
                    by_hidden[part] = gradient @ factors
                if needs_weight:
                    by_weight = _with_product(by_weight, gradient.T, states[part])
        if needs_weight and by_weight is None:  # no position at all
            by_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(by_hidden, by_weight)
        ctx.dtype = weight.dtype
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        by_hidden, by_weight = ctx.saved_tensors
        return (
            None if by_hidden is None else by_hidden.mul_(factor.to(by_hidden.dtype)),
            None if by_weight is None else by_weight.mul_(factor).to(ctx.dtype),
            None, None, None,
        )  # fmt: skip


def _losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each position's cross-entropy, and turn `logits` into the gradient by them, in their own memory."""
    at = targets[:, None]
    wanted = logits.gather(1, at)
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    losses = total.log() + largest - wanted
    logits.div_(total)
    logits.scatter_add_(1, at, torch.full_like(wanted, -1.0))
    return losses[:, 0], logits


def _with_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `total`, in fp32 and in its own memory, with a product added; None is nothing yet, and is not zeroed."""
    if total is None:
        return (left @ right).float()
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


@dataclass
class EmbeddingLookups:
    """What the rows of a step looked up.

    Attributes:
        last: the next backward is that of the last row.
        ids: for each row whose backward is over, (tokens,) ids.
        gradients: for each of them, (tokens, hidden size).
    """

    last: bool = False
    ids: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def accumulate_embedding_gradient(model: Any) -> Iterator[EmbeddingLookups]:
    """Let the backwards of a step's rows give one gradient to the embedding: that of the row which is called last.

    Does nothing where the embedding is frozen or not torch's plain one.
    """
    lookups, layer = EmbeddingLookups(), unwrapped(model).get_input_embeddings()
    if not _is_plain(layer):
        yield lookups
        return
    layer.forward = lambda ids: _EmbeddingLookup.apply(layer.weight, ids, layer.padding_idx, lookups)
    try:
        yield lookups
    finally:
        del layer.forward


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is nn.Embedding
        and layer.weight.requires_grad
        and layer.max_norm is None
        and not (layer.sparse or layer.scale_grad_by_freq)
    )


class _EmbeddingLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, ids: Any, padding_idx: int | None, lookups: EmbeddingLookups) -> Any:
        ctx.save_for_backward(ids)
        ctx.lookups, ctx.rows, ctx.padding_idx = lookups, len(weight), -1 if padding_idx is None else padding_idx
        return embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        [ids], lookups = ctx.saved_tensors, ctx.lookups
        lookups.ids.append(ids.flatten())
        lookups.gradients.append(gradient.reshape(-1, gradient.shape[-1]))
        if not lookups.last and sum(map(len, lookups.ids)) < ctx.rows:
            return None, None, None, None
        gathered = torch.cat(lookups.gradients), torch.cat(lookups.ids)
        lookups.ids, lookups.gradients = [], []
        total = torch.ops.aten.embedding_dense_backward(*gathered, ctx.rows, ctx.padding_idx, False)
        return total, None, None, None
