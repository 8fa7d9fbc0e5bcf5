"""The norm of all gradients, exact to rounding, and clipping by it.

On a CPU torch adds up the squares of a tensor in one run of fp32: the norm of an embedding of 28 million numbers comes
out up to 1e-3 too small, and what is clipped by it is off by as much. DeepSpeed adds up in fp64.
"""

import math
from collections.abc import Iterable

import torch

from minisft.recipe import TrainingRecipe


def clipping_norm(training: TrainingRecipe) -> float:
    """Return the norm that gradients are clipped to: infinity changes none, and their norm is logged all the same."""
    return math.inf if training.max_grad_norm is None else training.max_grad_norm


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients of `parameters` so that their norm is at most `max_norm`; return what it was, () in fp32."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def gradient_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of all gradients together, () in fp32: row by row in fp32, and of the rows in fp64."""
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients if gradient.numel()]
    if not rows:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64).float()
