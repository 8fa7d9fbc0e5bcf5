"""Checks of the loss on real rows of the recipe: the mask reaches it, and no packing or split of a batch changes it.

They run on the model as it trains: in the recipe's precision, with its kernels, adapters and gradient checkpointing.
The reference, a padded batch in transformers' own attention, is computed in fp32, so that a fault that only half
precision has shows. Half precision allows much rounding; where the weights are in fp32, each comparison is made in fp32
too.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minisft.checking.context import CheckContext
from minisft.checking.reference import count_learned, padded_loss
from minisft.checking.result import Failed, NotRun
from minisft.checking.scratch import switch_off_dropout
from minisft.models import model_class, transformers_attention
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
# Relative difference of sums over some tokens that the order of additions causes, in fp32 and in half precision.
FP32_TOLERANCE, HALF_TOLERANCE = 5e-5, 2e-2
# With the loss scale with which training begins, 65,536, gradients may overflow: training skips such steps.
_LOSS_SCALE = 2.0**10
_ROW_EACH = "train with training.row_tokens=1, which gives every conversation a row of its own, or another model"
_REPORT = "report it, with the model's name and the versions in check.json"
Conversation = tuple[np.ndarray, np.ndarray]  # (input ids, labels)


def tolerance(context: CheckContext) -> float:
    """Return the relative difference that the recipe's precision allows between equal computations."""
    return FP32_TOLERANCE if choose_precision(context.recipe.training.precision) == "fp32" else HALF_TOLERANCE


@dataclass(frozen=True)
class Arithmetic:
    """A number format in which the losses are compared.

    Attributes:
        name: fp32, bf16 or fp16.
        tolerance: The relative difference that it allows between equal computations.
        forward: Returns the context manager in which the model computes in it.
    """

    name: str
    tolerance: float
    forward: Callable[[], contextlib.AbstractContextManager[None]]


def live_trainer(context: CheckContext) -> "SupervisedTokenTrainer":
    """Return a vanilla trainer in this process, on the rows of the scratch steps, with dropout off.

    Its model is prepared as that of a training is: accelerate has put the recipe's precision into its forward.
    """
    if context.live is None:
        trainer = context.train_in_scratch(context.reference_recipe)
        switch_off_dropout(trainer.model)
        trainer.args.save_strategy = "no"
        assert trainer.model is not None
        trainer.prepare_weights()
        trainer.accelerator.prepare_model(trainer.model)
        trainer.model.to(trainer.args.device)
        context.probed = trainer.probe()
    assert context.live is not None
    return context.live


def _arithmetics(context: CheckContext) -> list[Arithmetic]:
    """Return the recipe's arithmetic and, if that is half precision and the weights are in fp32, fp32."""
    trainer, precision = live_trainer(context), choose_precision(context.recipe.training.precision)
    found = [Arithmetic(precision, tolerance(context), contextlib.nullcontext)]
    model: Any = trainer.model
    with trainer.weights_in_fp32():
        exact = next(model.parameters()).dtype == torch.float32
    if precision != "fp32" and exact:
        found.append(Arithmetic("fp32", FP32_TOLERANCE, trainer.arithmetic_of_fp32))
    return found


def mask_reaches_the_loss(context: CheckContext) -> str:
    """Compare a batch of the trainer's data loader with the labels on disk, and a loss with those of its parts."""
    trainer = live_trainer(context)
    batch: StepBatch = next(iter(trainer.get_train_dataloader()))
    dataset: Any = trainer.train_dataset
    # 1. The targets of each row are the labels of its conversations, and each is the token after its position.
    for row in batch.rows:
        labels = [np.asarray(dataset[index]["labels"])[1:] for index in row.indexes]
        expected = np.concatenate([part[part != IGNORED] for part in labels]) if labels else np.zeros(0)
        next_tokens = row.input_ids[0, row.predict_at + 1]
        if not np.array_equal(row.targets.numpy(), expected) or not torch.equal(row.targets, next_tokens):
            problem = f"the batch has {len(row.targets)} targets, the labels of its rows are {len(expected)}"
            if len(row.targets) == len(expected):
                problem = "the targets of the batch are not the labels of its rows"
            raise Failed(f"{problem}: the mask is lost before it reaches the loss", _REPORT)
    # 2. The step divides by their number.
    learned = sum(len(row.targets) for row in batch.rows)
    if learned != batch.step_supervised:
        raise Failed(f"the step counts {batch.step_supervised} learned tokens, its rows hold {learned}", _REPORT)
    # 3. The loss looks at the mask.
    _compare_halves(context, trainer)
    return f"{learned:,} learned of {batch.step_tokens:,} tokens in a step's batch"


def _compare_halves(context: CheckContext, trainer: "SupervisedTokenTrainer") -> None:
    """Check that the losses under two halves of a mask add up to the loss under the full mask, and each is less."""
    ids, labels = _conversations(trainer)[0]
    learned = np.flatnonzero(labels[1:] != IGNORED) + 1
    if len(learned) < 2:
        return
    halves = [np.full_like(labels, IGNORED) for _ in range(2)]
    for half, positions in zip(halves, np.split(learned, [len(learned) // 2]), strict=True):
        half[positions] = labels[positions]
    for arithmetic in _arithmetics(context):
        with arithmetic.forward():
            full, first, second = (_row_losses(context, [[(ids, mask)]])[0] for mask in (labels, *halves))
            if not _close(first + second, full, arithmetic.tolerance) or first == full:
                halved = f"the losses of two halves of a mask are {first:.4f} and {second:.4f}"
                raise Failed(f"{halved}, that of the full mask is {full:.4f} ({arithmetic.name})", _REPORT)


def padding_changes_nothing(context: CheckContext) -> str:
    """Compare conversations one at a time, without padding, with a padded batch in transformers' own attention."""
    trainer = live_trainer(context)
    conversations = _conversations(trainer)
    padded, sums = _padded_loss(trainer, conversations), []
    for arithmetic in _arithmetics(context):
        with arithmetic.forward():
            free = math.fsum(_row_losses(context, [[conversation] for conversation in conversations]))
            if not _close(free, padded, arithmetic.tolerance):
                problem = (
                    f"padding-free loss {free:.5f} in {arithmetic.name}, padded loss {padded:.5f} ({_name(trainer)})"
                )
                raise Failed(problem, _REPORT)
            sums.append(f"{free:.4f} in {arithmetic.name}")
    width = max(len(ids) for ids, _ in conversations)
    return (
        f"{len(conversations)} conversations in {width} columns: summed loss {padded:.4f}, {' and '.join(sums)} without"
    )


def rows_keep_conversations_apart(context: CheckContext) -> str:
    """Compare several conversations in one row with each in a row of its own, and name what leaks where they differ."""
    trainer = live_trainer(context)
    conversations = _conversations(trainer)
    if len(conversations) < 2:
        raise NotRun("there is only one conversation to train on")
    _require_rows_of_several(context, trainer, conversations)
    sums = []
    for arithmetic in _arithmetics(context):
        with arithmetic.forward():
            packed = _row_losses(context, [conversations])[0]
            separate = math.fsum(_row_losses(context, [[conversation] for conversation in conversations]))
            sums.append(f"{packed:.4f} and {separate:.4f} in {arithmetic.name}")
            if not _close(packed, separate, arithmetic.tolerance):
                problem = f"{len(conversations)} conversations in one row, and in separate rows: {sums[-1]}; "
                problem += _describe_leak(context, trainer, conversations, arithmetic.tolerance)
                raise Failed(problem, _ROW_EACH)
    return f"{len(conversations)} conversations in one row, and in separate rows: summed loss {', '.join(sums)}"


def _require_rows_of_several(
    context: CheckContext, trainer: "SupervisedTokenTrainer", conversations: list[Conversation]
) -> None:
    if context.probed is not None and context.probed.verdict == "alone":
        precise = _arithmetics(context)[-1]
        with precise.forward():
            leak = _describe_leak(context, trainer, conversations, precise.tolerance)
        raise NotRun(f"{leak}, so training gives each conversation its own row")


def _describe_leak(
    context: CheckContext, trainer: "SupervisedTokenTrainer", conversations: list[Conversation], allowed: float
) -> str:
    """Return a sentence about what a model does wrong with several conversations in a row."""
    # 1. Does the loss depend on the positions?
    ids, labels = conversations[0]
    row = pack_sequences([(ids, labels)])
    at_zero = PackedRow(row.input_ids, row.position_ids * 0, row.lengths, row.predict_at, row.targets, row.indexes)
    if context.loss_of(row) == context.loss_of(at_zero):
        return f"{_name(trainer)} ignores position_ids, so a conversation does not begin at position 0"
    # 2. Does the loss of the later conversations depend on the tokens of the first?
    unlearned = np.full_like(labels, IGNORED)
    changed = (np.roll(ids, 1), unlearned)
    before, after = _row_losses(context, [[(ids, unlearned), *conversations[1:]], [changed, *conversations[1:]]])
    if not _close(before, after, allowed):
        return f"{_name(trainer)} lets tokens of one conversation see those of another"
    return f"{_name(trainer)} computes another loss for a conversation when another one precedes it"


def splitting_changes_nothing(context: CheckContext) -> str:
    """Run the trainer's step on a batch as one row and as a row for each conversation, forward and backward."""
    trainer = live_trainer(context)
    conversations = _conversations(trainer)
    _require_rows_of_several(context, trainer, conversations)
    count = len(conversations)
    padded = _padded_loss(trainer, conversations) / count_learned(_as_lists(conversations))
    sums = []
    for arithmetic in _arithmetics(context):
        with arithmetic.forward():
            one_row, split = (_take_step(trainer, count, row_tokens) for row_tokens in (1 << 40, 1))
            for quantity, in_one_row, in_rows in zip(("loss", "gradient norm"), one_row, split, strict=True):
                if not _close(in_one_row, in_rows, 10 * arithmetic.tolerance):
                    text = f"the {quantity} of a step in {arithmetic.name} is {in_one_row:.5f} in one row"
                    raise Failed(f"{text}, {in_rows:.5f} in {count}: it depends on how the batch is split", _REPORT)
            if not _close(one_row[0], padded, arithmetic.tolerance):
                problem = f"the step's loss is {one_row[0]:.5f} in {arithmetic.name}, the mean over its learned tokens "
                raise Failed(f"{problem}{padded:.5f}", _REPORT)
            sums.append(
                f"loss {one_row[0]:.4f} and {split[0]:.4f}, gradient norm {one_row[1]:.3f} in {arithmetic.name}"
            )
    return f"in one row and in {count}: {'; '.join(sums)}"


def _take_step(trainer: "SupervisedTokenTrainer", count: int, row_tokens: int) -> tuple[float, float]:
    """Return loss and gradient norm of the trainer's own step on its first `count` conversations."""
    dataset, model = trainer.train_dataset, trainer.model
    assert model is not None
    sampler = StepSampler(
        measure_lengths(dataset), global_batch=count, row_tokens=row_tokens, processes=1, rank=0, seed=0
    )
    rows = RowDataset(dataset)
    batch = collate([rows[plan] for plan in sampler.plan(np.arange(count))])
    scaler = trainer.accelerator.scaler  # None except in fp16
    if scaler is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": _LOSS_SCALE})
    trainer.clear_gradients()
    loss = float(trainer.training_step(model, batch))
    norms = [weight.grad.norm() for weight in trainer.trained_parameters() if weight.grad is not None]
    trainer.clear_gradients()
    return loss, float(torch.stack(norms).norm()) / trainer.loss_scale()


# --- shared by the checks ---------------------------------------------------------------------------------


def _conversations(trainer: "SupervisedTokenTrainer") -> list[Conversation]:
    """Return the first conversations of the trainer's data."""
    dataset: Any = trainer.train_dataset
    rows = [dataset[index] for index in range(min(CONVERSATIONS, len(dataset)))]
    return [(np.asarray(row["input_ids"]), np.asarray(row["labels"])) for row in rows]


def _row_losses(context: CheckContext, rows: Sequence[Sequence[Conversation]]) -> list[float]:
    """Return the trainer's loss of each row of conversations, summed over its learned tokens."""
    return [context.loss_of(pack_sequences(row)) for row in rows]


@torch.no_grad()
def _padded_loss(trainer: "SupervisedTokenTrainer", conversations: list[Conversation]) -> float:
    """Return the summed loss of a padded batch in transformers' own attention, in the format of the exact weights."""
    assert trainer.model is not None
    trainer.model.eval()
    with transformers_attention(trainer.model), trainer.arithmetic_of_fp32():
        return float(padded_loss(trainer.model, _as_lists(conversations)))


def _as_lists(conversations: list[Conversation]) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in conversations]


def _close(first: float, second: float, allowed: float) -> bool:
    return math.isfinite(first) and math.isclose(first, second, rel_tol=allowed, abs_tol=1e-7)


def _name(trainer: "SupervisedTokenTrainer") -> str:
    return model_class(trainer.model).__name__
