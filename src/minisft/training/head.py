"""The loss of supervised tokens without all their logits at once.

Logits of a row are the largest tensor of training where the vocabulary is large: supervised tokens x vocabulary, three
or four times over. Here the output layer takes a chunk of positions at a time and turns its logits into losses and into
gradients while they are there, so memory does not grow with the row, and nothing is computed twice. The idea is that of
Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009) and of Liger's fused linear cross-entropy (Hsu et al. 2024,
arXiv 2410.10989), in plain torch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

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
def giving_losses(layer: nn.Linear, targets: torch.Tensor) -> Iterator[None]:
    """Let an output layer return (1, 1) the sum of the cross-entropies of `targets`, where it would return logits.

    Args:
        layer: it gets hidden states of shape (1, supervised, hidden size).
        targets: (supervised,) token ids.
    """
    with _giving(layer, lambda hidden: sum_of_losses(hidden[0], layer.weight, targets).reshape(1, 1)):
        yield


def passes_on(layer: nn.Linear, forward: Callable[[], torch.Tensor]) -> bool:
    """Say whether a model returns what its output layer gives as it is: not scaled, capped or cut, in place or not.

    Args:
        layer: the model's output layer.
        forward: runs the model, and returns its logits.
    """
    given: list[torch.Tensor] = []

    def mark(hidden: torch.Tensor) -> torch.Tensor:
        given.append(torch.zeros((1, 1), device=hidden.device))
        return given[-1]

    with _giving(layer, mark):
        logits = forward()
    if len(given) != 1 or logits.shape != (1, 1):
        return False
    memory = [tensor.untyped_storage()._cdata for tensor in (logits, given[0])]  # a wrapper may have made a view
    return memory[0] == memory[1] and logits._version == 0


@contextlib.contextmanager
def _giving(layer: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del layer.forward


def sum_of_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropies, () in fp32, of logits `hidden @ weight.T` that are never there together.

    Args:
        hidden: (positions, hidden size).
        weight: (vocabulary, hidden size).
        targets: (positions,) token ids.
    """
    return _SumOfLosses.apply(  # type: ignore[no-any-return]
        hidden, weight, targets, products_dtype(weight), torch.is_grad_enabled()
    )


def products_dtype(weight: torch.Tensor) -> torch.dtype:
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
