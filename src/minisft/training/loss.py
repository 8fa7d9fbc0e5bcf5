"""The loss of supervised tokens, computed without all their logits at once.

Logits of a row are the largest tensor of training where the vocabulary is large: supervised tokens x vocabulary, three
or four copies of them. Here the output layer takes a chunk of positions at a time and turns its logits into losses and
gradients at once, so memory does not grow with the row, and nothing is computed twice. The idea is that of
Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009) and of Liger's fused linear cross-entropy (Hsu et al. 2024,
arXiv 2410.10989), in plain torch.

Autograd makes a gradient of the embedding's size (vocabulary x hidden size) for every forward, mostly zeros: on a CPU
and with a large vocabulary that takes longer than several layers of a short row. Here each row of a step keeps the
gradients of the embeddings that it looked up (tokens x hidden size), and the backward of the last row adds all of them.
An earlier row adds them once they are as many as the embedding has rows, so that they never take more memory than the
full gradient.
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
from minisft.training.model_call import PADDING_FREE_CALL, ModelCall

# By output layer: whether its model returns the logits of the layer unchanged.
_fusable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def row_loss(
    model: Any, row: PackedRow, call: ModelCall = PADDING_FREE_CALL, *, backward_factor: float = 1.0
) -> torch.Tensor:
    """Return the sum of the cross-entropies of a row's supervised tokens, () in fp32; see `row_losses`."""
    return row_losses(model, row, call, backward_factor=backward_factor)[0]


def row_losses(
    model: Any, row: PackedRow, call: ModelCall = PADDING_FREE_CALL, *, backward_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the cross-entropies of a row's supervised tokens, () in fp32, and each without a gradient.

    `logits_to_keep` selects the positions that predict a supervised token; their logits are computed a chunk at a time,
    in shape (chunk, vocabulary). All logits (supervised, vocabulary) are computed at once for models that change their
    logits afterwards (a scale, a soft cap), and for models that cannot select positions.

    Args:
        model: The model, or the wrapper of DDP or DeepSpeed around it.
        row: The row, on the device of the model.
        call: How the model is called.
        backward_factor: The factor by which the loss will be multiplied before its backward, the loss scale included.
            Only fp16 needs it, and only for precision: the gradients of this function are those of the plain sum.
    """
    layer = output_layer(model)
    if layer is None or not _can_fuse(model, layer, row, call):
        return _loss_of_all_logits(model, row, call)
    with fused_loss_head(layer, row.targets, backward_factor) as losses:
        total = forward_row(model, row, call)[0, 0]
    return total, losses[-1]  # gradient checkpointing may have computed them twice


def _loss_of_all_logits(model: Any, row: PackedRow, call: ModelCall) -> tuple[torch.Tensor, torch.Tensor]:
    logits = forward_row(model, row, call)[0]
    if len(row.targets) == 0:  # a row without conversations: its forward takes part in the collectives
        return logits.sum().float() * 0.0, logits.new_zeros(0)
    with torch.no_grad():
        losses = cross_entropy(logits.float(), row.targets, reduction="none")
    return cross_entropy(logits.float(), row.targets, reduction="sum"), losses


def forward_row(model: Any, row: PackedRow, call: ModelCall = PADDING_FREE_CALL) -> Any:
    """Return the logits of the positions of a row that predict a supervised token, (1, supervised, vocabulary)."""
    logits = model(**call.arguments(row)).logits
    return logits if call.selects_logits else logits[:, row.predict_at]


def _can_fuse(model: Any, layer: nn.Linear, row: PackedRow, call: ModelCall) -> bool:
    """Return whether the model returns raw logits; tested once for each model on one token, in eval mode."""
    if layer not in _fusable:
        token, learned = row.input_ids[:, :1], model.training
        probe = PackedRow(token, torch.zeros_like(token), (1,), torch.zeros_like(token[0]), token[0], ())
        model.eval()
        with torch.no_grad():
            _fusable[layer] = returns_raw_logits(layer, lambda: forward_row(model, probe, call))
        model.train(learned)
    return _fusable[layer]


# Number of logits of a chunk. On two cores 2^22 took 1.08 of the time of all logits at once, 2^24 0.89, 2^26 no less.
_CHUNK_ON_CPU, _CHUNK = 1 << 24, 1 << 27


def output_layer(model: Any) -> nn.Linear | None:
    """Return the layer that computes logits from hidden states; None if it is not a plain linear layer without bias."""
    layer = unwrapped(model).get_output_embeddings()
    return layer if type(layer) is nn.Linear and layer.bias is None else None


def unwrapped(model: Any) -> Any:
    """Return the model inside the wrappers of DDP and DeepSpeed."""
    while hasattr(model, "module"):
        model = model.module
    return model


def chunk_length(vocabulary: int, on_cpu: bool) -> int:
    """Return the number of positions whose logits are computed at once."""
    return max(1, (_CHUNK_ON_CPU if on_cpu else _CHUNK) // vocabulary)


@contextlib.contextmanager
def fused_loss_head(
    layer: nn.Linear, targets: torch.Tensor, backward_factor: float = 1.0
) -> Iterator[list[torch.Tensor]]:
    """Let an output layer return the sum of the cross-entropies of `targets`, (1, 1), in place of logits.

    The list that it yields gets the cross-entropies themselves, (supervised,), at each call of the layer.

    Args:
        layer: Output layer; its input are hidden states of shape (1, supervised, hidden size).
        targets: (supervised,) token ids.
        backward_factor: As for `row_loss`.
    """
    found: list[torch.Tensor] = []

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        total, losses = fused_losses(hidden[0], layer.weight, targets, backward_factor)
        found.append(losses)
        return total.reshape(1, 1)

    with _replace_forward(layer, loss_of):
        yield found


def returns_raw_logits(layer: nn.Linear, forward: Callable[[], torch.Tensor]) -> bool:
    """Return whether a model returns the logits of its output layer unchanged: not scaled, capped or cut.

    Args:
        layer: Output layer of the model.
        forward: Runs the model and returns its logits.
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


def fused_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, backward_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the cross-entropies of the logits `hidden @ weight.T`, () in fp32, and each without a gradient.

    The logits are computed in chunks.

    The forward computes the gradients too. In fp16 a probability below 6e-8 would become zero there, so the gradient of
    the logits is multiplied by `backward_factor` while it is in fp32, as a backward after the loss scale would do; the
    backward then multiplies only by what the incoming gradient has beyond it (Micikevicius et al. 2018,
    "Mixed Precision Training", arXiv 1710.03740, section 3.2).

    Args:
        hidden: (positions, hidden size).
        weight: (vocabulary, hidden size).
        targets: (positions,) token ids.
        backward_factor: As for `row_loss`.
    """
    products = matmul_dtype(weight)
    factor = backward_factor if products == torch.float16 else 1.0
    return _SumOfLosses.apply(  # type: ignore[no-any-return]
        hidden, weight, targets, products, factor, torch.is_grad_enabled()
    )


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the number format in which a product with `weight` is computed; autocast may set it.

    accelerate puts autocast into the forward of a model, so the answer holds only inside that forward.
    """
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _SumOfLosses(torch.autograd.Function):
    """The sum of cross-entropies, whose forward computes the gradients too: d loss / d logits = softmax - onehot."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, targets: Any, products: torch.dtype, applied: float, learning: bool
    ) -> Any:
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
                gradient = (gradient if applied == 1.0 else gradient.mul_(applied)).to(products)
                if by_hidden is not None:
                    by_hidden[part] = gradient @ factors
                if needs_weight:
                    by_weight = _with_product(by_weight, gradient.T, states[part])
        if needs_weight and by_weight is None:  # no supervised position
            by_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(by_hidden, by_weight)
        ctx.dtype, ctx.applied = weight.dtype, applied
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor, _: Any) -> Any:
        by_hidden, by_weight = ctx.saved_tensors
        factor = factor / ctx.applied
        return (
            None if by_hidden is None else by_hidden.mul_(factor.to(by_hidden.dtype)),
            None if by_weight is None else by_weight.mul_(factor).to(ctx.dtype),
            None, None, None, None,
        )  # fmt: skip


def _losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of each position, and replace `logits` in place by the gradient with respect to them."""
    at = targets[:, None]
    wanted = logits.gather(1, at)
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    losses = total.log() + largest - wanted
    logits.div_(total)
    logits.scatter_add_(1, at, torch.full_like(wanted, -1.0))
    return losses[:, 0], logits


def _with_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add a product to `total` (fp32) in place and return it; None stands for zero, without allocating zeros."""
    if total is None:
        return (left @ right).float()
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


@dataclass
class EmbeddingLookups:
    """The embedding lookups of the rows of a step.

    Attributes:
        last: Whether the next backward is that of the last row.
        ids: Token ids of each row whose backward has run, (tokens,).
        gradients: Gradients of the embeddings that it looked up, (tokens, hidden size).
    """

    last: bool = False
    ids: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def accumulate_embedding_gradient(model: Any) -> Iterator[EmbeddingLookups]:
    """Accumulate the embedding gradients of a step's rows, and let the backward of the last row add them.

    Does nothing if the embedding is frozen or is not a plain `nn.Embedding`.
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
        # In fp32: a token occurs many times, and autograd rounds the sum to the format of the weights.
        gathered = torch.cat(lookups.gradients).float(), torch.cat(lookups.ids)
        lookups.ids, lookups.gradients = [], []
        total = torch.ops.aten.embedding_dense_backward(*gathered, ctx.rows, ctx.padding_idx, False)
        return total, None, None, None
