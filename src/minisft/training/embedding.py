"""One gradient of the embedding for all rows of a step.

Autograd makes a gradient of the embedding's size (vocabulary x hidden size) for every forward, mostly zeros: on a CPU
and with a large vocabulary that takes longer than several layers of a short row. Here the rows of a step leave the
gradients of what they looked up (tokens x hidden size) for the last one, whose backward adds all of them; or for one
before it, once they are as many as the embedding has rows, so that what waits never takes more memory than it saves.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding

from minisft.training.head import unwrapped


@dataclass
class Lookups:
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
def one_gradient(model: Any) -> Iterator[Lookups]:
    """Let the backwards of a step's rows give one gradient to the embedding: that of the row which is called last.

    Does nothing where the embedding is frozen or not torch's plain one.
    """
    lookups, layer = Lookups(), unwrapped(model).get_input_embeddings()
    if not _is_plain(layer):
        yield lookups
        return
    layer.forward = lambda ids: _Lookup.apply(layer.weight, ids, layer.padding_idx, lookups)
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


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, ids: Any, padding_idx: int | None, lookups: Lookups) -> Any:
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
