"""Plain arithmetic to compare with: padded batches, every logit, torch's AdamW; nothing of MiniSFT's training."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

Conversations = Sequence[tuple[Sequence[int], Sequence[int]]]  # (input ids, labels) of each
IGNORED = -100


@contextlib.contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Give the model transformers' own attention for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def padded_loss(model: Any, conversations: Conversations) -> torch.Tensor:
    """Sum of the cross-entropies of the learned tokens, the conversations padded on the right to the longest."""
    ids, mask, labels = _padded(conversations, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)


def _padded(conversations: Conversations, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in conversations)
    ids = [[*ids, *[0] * (width - len(ids))] for ids, _ in conversations]
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in conversations]
    labels = [[*labels, *[IGNORED] * (width - len(labels))] for _, labels in conversations]
    as_tensor = [torch.tensor(rows, device=device) for rows in (ids, mask, labels)]
    return as_tensor[0], as_tensor[1], as_tensor[2]


def count_learned(conversations: Conversations) -> int:
    """Learned tokens that have one before them."""
    return sum(label != IGNORED for _, labels in conversations for label in labels[1:])


def plain_steps(
    model: Any,
    steps: Sequence[Conversations],
    learning_rates: Sequence[float],
    *,
    decayed: set[str],
    weight_decay: float,
    max_grad_norm: float,
    arithmetic: Any,
) -> list[tuple[float, float]]:
    """Train a model a few steps; its weights change.

    Args:
        model: with dropout off.
        steps: the conversations of each step.
        learning_rates: of each step.
        decayed: the parameters with weight decay.
        weight_decay: theirs.
        max_grad_norm: to which gradients are clipped.
        arithmetic: gives the context of a forward (autocast, or none).

    Returns:
        The mean loss over the learned tokens and the gradient norm before clipping, of each step.
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for name, weight in named if (name in decayed) == decay], "weight_decay": amount}
        for decay, amount in ((True, weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)
    model.train()
    came_out = []
    for conversations, learning_rate in zip(steps, learning_rates, strict=True):
        optimizer.zero_grad()
        with arithmetic():
            loss = padded_loss(model, conversations) / count_learned(conversations)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([weight for _, weight in named], max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        came_out.append((loss.item(), norm.item()))
    optimizer.zero_grad()
    return came_out
