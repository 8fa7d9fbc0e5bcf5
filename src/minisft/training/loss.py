"""The loss of a row: its supervised tokens alone."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from minisft.training.batching import Row
from minisft.training.head import giving_losses, output_layer, passes_on, products_dtype

# Of an output layer: whether its model returns what it gives as it is.
_passed_on: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def row_loss(model: Any, row: Row) -> torch.Tensor:
    """Return the sum of the cross-entropies of a row's supervised tokens, () in fp32.

    `logits_to_keep` takes the positions to predict at, and of these a chunk at a time has its logits, of shape (chunk,
    vocabulary). Models that change their logits afterwards (a scale, a soft cap) have (supervised, vocabulary) of them
    at once, and so has fp16, whose gradients of probabilities would vanish before the loss scale reaches them.
    """
    layer = output_layer(model)
    if layer is None or products_dtype(layer.weight) == torch.float16 or not _passes_losses_on(model, layer, row):
        return _loss_of_all_logits(model, row)
    with giving_losses(layer, row.targets):
        return _forward(model, row)[0, 0]


def _loss_of_all_logits(model: Any, row: Row) -> torch.Tensor:
    logits = _forward(model, row)[0]
    if len(row.targets) == 0:  # a row without conversations, there for the collectives of its forward
        return logits.sum().float() * 0.0
    return cross_entropy(logits.float(), row.targets, reduction="sum")


def _forward(model: Any, row: Row) -> Any:
    return model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        logits_to_keep=row.predict_at,
        conversation_lengths=row.lengths,
        use_cache=False,
    ).logits


def _passes_losses_on(model: Any, layer: nn.Linear, row: Row) -> bool:
    """Find out on a row of one token, once for each model, without touching random states."""
    if layer not in _passed_on:
        token, learned = row.input_ids[:, :1], model.training
        probe = Row(token, torch.zeros_like(token), (1,), torch.zeros_like(token[0]), token[0], ())
        model.eval()
        with torch.no_grad():
            _passed_on[layer] = passes_on(layer, lambda: _forward(model, probe))
        model.train(learned)
    return _passed_on[layer]
