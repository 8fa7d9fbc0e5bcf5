"""Loss on held-out rows: the token-weighted mean over their supervised tokens, teacher forced."""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from minisft.data.encoding import IGNORED
from minisft.evaluation.generation import forward_arguments

Row = tuple[Sequence[int], Sequence[int]]  # input ids, and labels: unshifted, -100 where not supervised
# Tokens in a batch, padding included; their logits in fp32 over a vocabulary of 49,152 take 400 MB.
BATCH_TOKENS = 2048


def mean_loss(sums: Iterable[tuple[float, int]]) -> tuple[float, int]:
    """Mean negative log-likelihood, in nats per supervised token, and how many tokens that is.

    Args:
        sums: (sum of losses, tokens) of each batch, in order.
    """
    total, count = 0.0, 0
    for loss, tokens in sums:
        total, count = total + loss, count + tokens
    return (total / count if count else float("nan")), count


def loss_batches(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of similar length together, longest first."""
    batches: list[list[Row]] = []
    room = 0
    for row in sorted(rows, key=lambda row: -len(row[0])):
        if not batches or len(batches[-1]) >= room:
            batches.append([])
            room = max(1, BATCH_TOKENS // len(row[0]))
        batches[-1].append(row)
    return batches


@torch.inference_mode()
def sum_of_losses(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[float, int]:
    """The summed loss of one batch's supervised tokens, and how many they are; the first row is the longest."""
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
