"""The loss, on real rows of the recipe: the mask reaches it, and no lay-out or split of a batch changes it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minisft.checking.context import CheckContext
from minisft.checking.reference import count_learned, padded_loss, plain_attention
from minisft.checking.result import Failed, NotRun
from minisft.checking.scratch import switch_off_dropout
from minisft.training.batching import (
    IGNORED,
    PackedRow,
    RowDataset,
    StepBatch,
    StepSampler,
    collate,
    measure_lengths,
    pack_sequences,
)
from minisft.training.device import choose_precision

if TYPE_CHECKING:
    from minisft.training.trainer import SupervisedTokenTrainer

CONVERSATIONS = 3
# Relative, of sums over some tokens: what the order of additions changes in fp32, and in half precision.
EXACT, HALF = 5e-5, 2e-2
_REPORT = "report it, with the model's name and the versions in check.json"
Conversation = tuple[np.ndarray, np.ndarray]


def tolerance(context: CheckContext) -> float:
    return EXACT if choose_precision(context.recipe.training.precision) == "fp32" else HALF


def live_trainer(context: CheckContext) -> "SupervisedTokenTrainer":
    """A vanilla trainer in this process, on the rows of the scratch steps, dropout off."""
    if context.live is None:
        trainer = context.train_in_scratch(context.reference_recipe)
        switch_off_dropout(trainer.model)
        trainer.args.save_strategy = "no"
        assert trainer.model is not None
        trainer.model.to(trainer.args.device)
    assert context.live is not None
    return context.live


def mask_reaches_the_loss(context: CheckContext) -> str:
    """Compare a batch of the trainer's own data loader with the labels on disk, and add up losses of parts."""
    trainer = live_trainer(context)
    batch: StepBatch = next(iter(trainer.get_train_dataloader()))
    for row in batch.rows:
        _compare_targets(row, trainer.train_dataset)
    learned = sum(len(row.targets) for row in batch.rows)
    if learned != batch.step_supervised:
        raise Failed(f"the step counts {batch.step_supervised} learned tokens, its rows hold {learned}", _REPORT)
    _compare_parts(context, trainer)
    return f"{learned:,} learned of {batch.step_tokens:,} tokens in a step's batch"


def _compare_targets(row: PackedRow, dataset: Any) -> None:
    """The targets of a row are the labels of its conversations, and each is the token after its position."""
    conversations = [np.asarray(dataset[index]["labels"]) for index in row.indexes]
    labels = np.concatenate([[IGNORED, *labels[1:]] for labels in conversations]) if conversations else np.zeros(0)
    expected = labels[labels != IGNORED]
    following = row.input_ids[0, row.predict_at + 1]
    if not np.array_equal(row.targets.numpy(), expected) or not torch.equal(row.targets, following):
        problem = f"the batch has {len(row.targets)} targets, the labels of its rows are {len(expected)}"
        if len(row.targets) == len(expected):
            problem = "the targets of the batch are not the labels of its rows"
        raise Failed(f"{problem}: the mask is lost on the way to the loss", _REPORT)


def _compare_parts(context: CheckContext, trainer: "SupervisedTokenTrainer") -> None:
    """The losses under two halves of a mask add up to the loss under the whole; each alone is less."""
    ids, labels = _conversations(trainer)[0]
    at = np.flatnonzero(labels[1:] != IGNORED) + 1
    if len(at) < 2:
        return
    halves = [np.full_like(labels, IGNORED) for _ in range(2)]
    for half, places in zip(halves, (at[: len(at) // 2], at[len(at) // 2 :]), strict=True):
        half[places] = labels[places]
    whole, first, second = (_row_losses(context, [[(ids, mask)]])[0] for mask in (labels, *halves))
    if not _close(first + second, whole, tolerance(context)) or first == whole:
        problem = (
            f"the losses of two halves of a mask are {first:.4f} and {second:.4f}, that of the whole is {whole:.4f}"
        )
        raise Failed(problem, _REPORT)


def padding_changes_nothing(context: CheckContext) -> str:
    """Compare conversations one at a time, without padding, with a padded batch in transformers' own attention."""
    trainer = live_trainer(context)
    conversations = _conversations(trainer)
    free = math.fsum(_row_losses(context, [[one] for one in conversations]))
    padded = _padded(trainer, conversations)
    if not _close(free, padded, tolerance(context)):
        raise Failed(f"padding-free loss {free:.5f}, padded loss {padded:.5f} ({_name(trainer)})", _REPORT)
    width = max(len(ids) for ids, _ in conversations)
    return f"{len(conversations)} conversations in {width} columns: summed loss {free:.4f} and {padded:.4f}"


def rows_keep_conversations_apart(context: CheckContext) -> str:
    """Compare several conversations in one row with each on its own, and name what leaks where they differ."""
    trainer = live_trainer(context)
    conversations = _conversations(trainer)
    if len(conversations) < 2:
        raise NotRun("there is only one conversation to train on")
    joined = _row_losses(context, [conversations])[0]
    alone = math.fsum(_row_losses(context, [[one] for one in conversations]))
    if not _close(joined, alone, tolerance(context)):
        problem = f"{len(conversations)} conversations in one row: {joined:.5f}, each on its own: {alone:.5f}; "
        fix = "train with training.row_tokens=1, which gives every conversation a row of its own, or another model"
        raise Failed(problem + _leak(context, trainer, conversations), fix)
    return f"{len(conversations)} conversations in a row: summed loss {joined:.4f}, each on its own: {alone:.4f}"


def _leak(context: CheckContext, trainer: "SupervisedTokenTrainer", conversations: list[Conversation]) -> str:
    """Say what a model does wrong with several conversations in a row."""
    ids, labels = conversations[0]
    row = pack_sequences([(ids, labels)])
    still = PackedRow(row.input_ids, row.position_ids * 0, row.lengths, row.predict_at, row.targets, row.indexes)
    straight, folded = (context.loss_of(one) for one in (row, still))
    if straight == folded:
        return f"{_name(trainer)} ignores position_ids, so a conversation does not begin at position 0"
    quiet = np.full_like(conversations[0][1], IGNORED)
    changed = (np.roll(ids, 1), quiet)
    before, after = _row_losses(context, [[(ids, quiet), *conversations[1:]], [changed, *conversations[1:]]])
    if not _close(before, after, tolerance(context)):
        return f"{_name(trainer)} lets tokens of one conversation see those of another"
    return f"{_name(trainer)} treats a conversation otherwise when another stands before it"


def splitting_changes_nothing(context: CheckContext) -> str:
    """Run the trainer's step on a batch whole and conversation by conversation, forward and backward."""
    trainer = live_trainer(context)
    conversations = _conversations(trainer)
    count = len(conversations)
    whole, split = (_step(trainer, count, row_tokens) for row_tokens in (1 << 40, 1))
    padded = _padded(trainer, conversations) / count_learned(_as_lists(conversations))
    allowed = tolerance(context)
    for problem, (first, second) in {"loss": (whole[0], split[0]), "gradient norm": (whole[1], split[1])}.items():
        if not _close(first, second, 10 * allowed):
            text = f"the {problem} of a step is {first:.5f} in one piece, {second:.5f} in {count}"
            raise Failed(f"{text}: it depends on how the batch is split", _REPORT)
    if not _close(whole[0], padded, allowed):
        raise Failed(f"the step's loss is {whole[0]:.5f}, the mean over its learned tokens {padded:.5f}", _REPORT)
    return f"in one piece and in {count}: loss {whole[0]:.4f} and {split[0]:.4f}, gradient norm {whole[1]:.3f}"


def _step(trainer: "SupervisedTokenTrainer", count: int, row_tokens: int) -> tuple[float, float]:
    """(loss, gradient norm) of the trainer's own step on its first `count` conversations."""
    dataset, model = trainer.train_dataset, trainer.model
    assert model is not None
    sampler = StepSampler(
        measure_lengths(dataset), global_batch=count, row_tokens=row_tokens, processes=1, rank=0, seed=0
    )
    rows = RowDataset(dataset)
    batch = collate([rows[plan] for plan in sampler.plan(np.arange(count))])
    model.zero_grad()
    loss = float(trainer.training_step(model, batch))
    norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return loss, float(torch.stack(norms).norm())


# --- what they share --------------------------------------------------------------------------------------


def _conversations(trainer: "SupervisedTokenTrainer") -> list[Conversation]:
    dataset: Any = trainer.train_dataset
    rows = [dataset[index] for index in range(min(CONVERSATIONS, len(dataset)))]
    return [(np.asarray(row["input_ids"]), np.asarray(row["labels"])) for row in rows]


def _row_losses(context: CheckContext, rows: Sequence[Sequence[Conversation]]) -> list[float]:
    """The trainer's loss of each row of conversations."""
    return [context.loss_of(pack_sequences(row)) for row in rows]


@torch.no_grad()
def _padded(trainer: "SupervisedTokenTrainer", conversations: list[Conversation]) -> float:
    assert trainer.model is not None
    trainer.model.eval()
    with plain_attention(trainer.model):
        return float(padded_loss(trainer.model, _as_lists(conversations)))


def _as_lists(conversations: list[Conversation]) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in conversations]


def _close(first: float, second: float, allowed: float) -> bool:
    return math.isclose(first, second, rel_tol=allowed, abs_tol=1e-7)


def _name(trainer: "SupervisedTokenTrainer") -> str:
    model: Any = trainer.model
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
