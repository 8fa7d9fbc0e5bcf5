"""Loss on held-out rows: the token-weighted mean over their supervised tokens, teacher forced."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from minisft.data.encoding import IGNORED
from minisft.evaluation.generation import forward_arguments

# Tokens in a batch, padding included; their logits in fp32 over a vocabulary of 49,152 take 400 MB.
BATCH_TOKENS = 2048


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[float, int]:
    """Mean negative log-likelihood, in nats per supervised token, and how many tokens that is.

    Args:
        model: a causal language model in eval mode.
        rows: (input ids, labels) of each row; labels are unshifted, -100 where not supervised.
    """
    total, count = 0.0, 0
    for batch in _batches(rows):
        loss, tokens = _sum_of_losses(model, batch)
        total, count = total + loss, count + tokens
    return (total / count if count else float("nan")), count


def _batches(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[list[tuple[Sequence[int], Sequence[int]]]]:
    """Rows of similar length together, longest first."""
    batches: list[list[tuple[Sequence[int], Sequence[int]]]] = []
    room = 0
    for row in sorted(rows, key=lambda row: -len(row[0])):
        if not batches or len(batches[-1]) >= room:
            batches.append([])
            room = max(1, BATCH_TOKENS // len(row[0]))
        batches[-1].append(row)
    return batches


def _sum_of_losses(model: PreTrainedModel, rows: list[tuple[Sequence[int], Sequence[int]]]) -> tuple[float, int]:
    longest = len(rows[0][0])
    ids = torch.tensor([[*i, *[0] * (longest - len(i))] for i, _ in rows], device=model.device)
    labels = torch.tensor([[*label, *[IGNORED] * (longest - len(label))] for _, label in rows], device=model.device)
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows], device=model.device)
    targets = labels[:, 1:]
    wanted = (targets != IGNORED).any(dim=0).nonzero()[:, 0]  # positions whose logits some row needs
    if len(wanted) == 0:
        return 0.0, 0
    if "logits_to_keep" in forward_arguments(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=wanted).logits
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, wanted]
    targets = targets[:, wanted]
    kept = targets != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[kept].float(), targets[kept], reduction="sum")
    return loss.item(), int(kept.sum())
