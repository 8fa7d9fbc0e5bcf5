"""A reference implementation: padded batches, all logits, torch's AdamW, and no code of MiniSFT's training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

Conversations = Sequence[tuple[Sequence[int], Sequence[int]]]  # (input ids, labels) of each
IGNORED = -100


def padded_loss(model: Any, conversations: Conversations) -> torch.Tensor:
    """Return the summed cross-entropy of the learned tokens of conversations that are padded on the right."""
    width = max(len(ids) for ids, _ in conversations)
    padded = (
        [[*ids, *[0] * (width - len(ids))] for ids, _ in conversations],
        [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in conversations],
        [[*labels, *[IGNORED] * (width - len(labels))] for _, labels in conversations],
    )
    ids, mask, labels = (torch.tensor(rows, device=model.device) for rows in padded)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)


def count_learned(conversations: Conversations) -> int:
    """Count the learned tokens; the first token of a conversation is never predicted."""
    return sum(label != IGNORED for _, labels in conversations for label in labels[1:])


def plain_steps(
    model: Any,
    steps: Sequence[Conversations],
    learning_rates: Sequence[float],
    *,
    decayed: set[str],
    weight_decay: float,
    max_grad_norm: float,
) -> list[tuple[float, float]]:
    """Train a model for a few steps; this changes its weights.

    Args:
        model: Model with dropout off.
        steps: The conversations of each step.
        learning_rates: The learning rate of each step.
        decayed: Names of the parameters with weight decay.
        weight_decay: Their weight decay.
        max_grad_norm: Norm to which the gradients are clipped.

    Returns:
        For each step, the mean loss over the learned tokens and the gradient norm before clipping.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for name, weight in named if (name in decayed) == decay], "weight_decay": amount}
        for decay, amount in ((True, weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)
    model.train()
    taken = []
    for conversations, learning_rate in zip(steps, learning_rates, strict=True):
        optimizer.zero_grad()
        loss = padded_loss(model, conversations) / count_learned(conversations)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([weight for _, weight in named], max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        taken.append((loss.item(), norm.item()))
    optimizer.zero_grad()
    return taken
