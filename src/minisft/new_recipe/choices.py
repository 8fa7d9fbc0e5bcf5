"""The rule by which `init` chooses each value, with its reason and its source. docs/init.md lists the rules.

Every rule depends on its arguments alone. A reason is what the recipe says as a comment: why this value, and what else
it could be.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minisft.data.split import choose_test
from minisft.data.stats import ENOUGH_TEST_ROWS
from minisft.training.batching import Sizes

# Learning rates of full fine-tuning, between which a straight line in log-log interpolates: 2e-4 for SmolLM2-135M
# (docs/results.md, measured by this project) and 8e-6 for 7B parameters (the published recipe of recipes/).
_SMALL, _SMALL_RATE = 135e6, 2e-4
_LARGE, _LARGE_RATE = 7.2e9, 8e-6
_LORA_FACTOR, _MOST_LORA_RATE = 10, 1e-3
_LENGTH_QUANTILE, _LENGTH_MULTIPLE = 0.995, 64
_ANSWER_QUANTILE, _ANSWER_MULTIPLE = 0.99, 16
_OUTLIER = 1.25  # the longest row is kept where it is at most this much longer than the quantile
_FEW_ROWS, _MANY_ROWS = 10_000, 100_000  # up to which 3 and 2 epochs are trained
_FEW_STEPS, _ENOUGH_STEPS = 100, 1_000
_SMALLEST_BATCH, _USUAL_BATCH, _LARGEST_BATCH = 4, 8, 128
_MOST_EPOCHS = 8
_TEST_SHARE, _MOST_TEST_SHARE = 0.1, 0.2
_GOOD_TEST_ROWS, _MOST_TEST_ROWS = 50, 1_000
_SCORED = 100  # conversations from which scoring more answers of each is preferred to scoring more conversations


@dataclass(frozen=True)
class Choice:
    """A value of the recipe, and why it has been chosen."""

    value: Any
    reason: str


def choose_max_length(lengths: np.ndarray, ends: np.ndarray, context: int | None, sample: str) -> Choice:
    """Choose `data.max_length`: nearly all rows fit, and at most 1 % of the answers are beyond it.

    Args:
        lengths: (rows,) Tokens of each row.
        ends: (answers,) Tokens of the row up to the end of each answer.
        context: Largest number of tokens that the model takes; None where its configuration does not say.
        sample: Description of the rows that were measured.
    """
    longest = int(lengths.max())
    quantile = int(
        max(
            np.quantile(lengths, _LENGTH_QUANTILE, method="higher"),
            np.quantile(ends, _ANSWER_QUANTILE, method="higher"),
        )
    )
    wanted = longest if longest <= _OUTLIER * quantile else quantile
    value = _round_up(wanted, _LENGTH_MULTIPLE)
    why = f"The longest of {sample} has {longest:,} tokens, and 99.5 % have at most {quantile:,}."
    if context is not None and value > context:
        value = context
        why += f" The model takes at most {context:,}."
    beyond = float((ends > value).mean())
    if beyond:
        why += (
            f" {percent(beyond)} of the answers lie beyond this length, and are left out or cut at their end "
            "(data.overflow: turns)."
        )
    else:
        why += " No answer is cut."
    if longest > value and (context is None or value < context):
        largest = min(_round_up(longest, _LENGTH_MULTIPLE), context or longest + _LENGTH_MULTIPLE)
        why += f" Alternative: {largest} cuts {'nothing' if largest >= longest else 'less'}, and needs more memory."
    return Choice(value, why)


def choose_max_new_tokens(answers: np.ndarray, is_last: np.ndarray, context: int | None) -> Choice:
    """Choose `evaluation.max_new_tokens`: at most 1 % of all answers, and of the last ones, are longer.

    Args:
        answers: (answers,) Tokens of each answer with its terminator.
        is_last: (answers,) Whether it is the last answer of its conversation.
        context: Largest number of tokens that the model takes; None where it is unknown.
    """
    parts = (answers, answers[is_last])
    quantile = int(max(np.quantile(part, _ANSWER_QUANTILE, method="higher") for part in parts))
    value = _round_up(quantile, _ANSWER_MULTIPLE)
    why = f"99 % of the reference answers have at most {quantile:,} tokens, and the longest has {int(answers.max()):,}."
    if context is not None and value > context // 2:
        value = context // 2
        why += f" Half of the model's context of {context:,} is left to the prompt."
    longer = float((answers > value).mean())
    why += f" Longer: {percent(longer)}. More costs time, since the base model often writes up to the limit."
    return Choice(value, why)


def choose_learning_rate(parameters: int, lora: bool) -> Choice:
    """Choose `training.learning_rate` by the number of parameters and whether adapters are trained."""
    exponent = math.log(_LARGE_RATE / _SMALL_RATE) / math.log(_LARGE / _SMALL)
    full = min(_SMALL_RATE, _SMALL_RATE * (parameters / _SMALL) ** exponent)
    source = (
        f"The larger the model, the smaller the rate: 2e-4 was measured for SmolLM2-135M, 8e-6 is the "
        f"published rate at 7B, and between them a line in log-log gives {rate_text(_one_digit(full))} for "
        f"{count_text(parameters)} parameters."
    )
    if not lora:
        return Choice(
            _one_digit(full),
            f"{source} On a million conversations, others take ten times as much. Alternative: compare some values "
            "with `minisft compare RECIPE --vary training.learning_rate=...`.",
        )
    rate = min(_MOST_LORA_RATE, _LORA_FACTOR * full)
    return Choice(
        _one_digit(rate),
        f"{source} Adapters need about ten times as much (Schulman et al. 2025, LoRA Without Regret; Dettmers et al. "
        "2023, arXiv 2305.14314, take 2e-4 at 7B), at most 1e-3 here.",
    )


def choose_epochs(train_rows: int) -> Choice:
    """Choose `training.epochs`: fewer for more rows, and more where there would be too few steps."""
    few = "Up to four epochs are almost as good as new data (Muennighoff et al. 2023, arXiv 2305.16264)."
    if train_rows > _MANY_ROWS:
        why = "more than 100,000 rows, as Zephyr was trained on 200,000 (arXiv 2310.16944)"
        return Choice(1, f"One epoch for {why}. Alternative: 2.")
    if train_rows > _FEW_ROWS:
        return Choice(2, f"Two epochs from 10,000 to 100,000 rows. {few}")
    if train_rows * 3 >= _FEW_STEPS * _SMALLEST_BATCH:
        return Choice(
            3, f"Three epochs for up to 10,000 rows, as in MiniSFT's recipe for Taskmaster-4. {few} Look at the "
            "held-out loss: where it rises early, train fewer, or set early_stopping: 1.",
        )  # fmt: skip
    value = min(_MOST_EPOCHS, math.ceil(_FEW_STEPS * _SMALLEST_BATCH / max(1, train_rows)))
    return Choice(
        value,
        f"{train_rows:,} rows give few steps, so that they are repeated; at most {_MOST_EPOCHS} epochs, as published. "
        "Look at the held-out loss: where it rises early, train fewer.",
    )


@dataclass(frozen=True)
class BatchChoice:
    """The conversations of an optimizer step, divided into `batch_size` a process and `accumulation` micro-steps."""

    batch_size: int
    accumulation: int
    reason: str


def choose_batch(train_rows: int, epochs: float, processes: int) -> BatchChoice:
    """Choose the number of conversations of an optimizer step: a power of two that leaves enough steps.

    Every process gets at least one conversation, and at most 8 in a micro-step.
    """
    seen = train_rows * epochs
    wanted = _LARGEST_BATCH
    while wanted > _SMALLEST_BATCH and seen / wanted < (_ENOUGH_STEPS if wanted > _USUAL_BATCH else _FEW_STEPS):
        wanted //= 2
    each = max(1, round(wanted / processes))
    accumulation = max(1, each // _USUAL_BATCH)
    batch_size = each // accumulation
    value = batch_size * accumulation * processes
    steps = math.ceil(train_rows / value) * epochs
    why = f"{value} conversations in an optimizer step give {steps:,.0f} steps."
    if processes > 1 or accumulation > 1:
        why += f" They are {batch_size}"
        why += f" for each of {processes} processes" if processes > 1 else ""
        why += f" in each of {accumulation} micro-steps." if accumulation > 1 else "."
    if value > wanted:
        why += f" {wanted} would suit these rows, but every process needs one."
    why += (
        f" The rule: {_USUAL_BATCH}, {_SMALLEST_BATCH} where there would be fewer than {_FEW_STEPS} steps, and up to "
        f"{_LARGEST_BATCH} where {_ENOUGH_STEPS:,} steps are left. A larger batch needs no more memory here: its rows "
        "are computed one after another."
    )
    return BatchChoice(batch_size, accumulation, why)


@dataclass(frozen=True)
class HeldOutChoice:
    """`data.test_fraction`, and the number of conversations that it holds out."""

    fraction: float
    conversations: int
    reason: str


def choose_held_out(rows: int, keys: np.ndarray) -> HeldOutChoice:
    """Choose `data.test_fraction`: a tenth, and at least 50 and at most 1,000 conversations where possible.

    Args:
        rows: Number of conversations.
        keys: (conversations,) Split keys of all or of the first of them (`data.split`): conversations with the same
            first prompt have the same key, and are held out together.
    """
    wanted = min(max(_TEST_SHARE * rows, _GOOD_TEST_ROWS), _MOST_TEST_ROWS)
    share = min(wanted / max(1, rows), _MOST_TEST_SHARE)
    share = float(f"{share:.2g}")
    held_out = round(float(choose_test(keys, share).mean()) * rows)
    if not held_out:
        why = "None can be held out, since all conversations begin with the same prompt. Give held-out data: data.test."
        return HeldOutChoice(0.0, 0, why)
    why = f"About {held_out:,} of {rows:,} conversations are held out, by their first prompt, to score checkpoints."
    if held_out < ENOUGH_TEST_ROWS:
        why += f" Fewer than {ENOUGH_TEST_ROWS} are too few to tell checkpoints apart: give more data, or data.test."
    elif share < _TEST_SHARE:
        why += " More than 1,000 would cost time and hardly narrow the interval."
    elif share > _TEST_SHARE:
        why += " It is more than a tenth, since scores of few conversations say little."
    return HeldOutChoice(share, held_out, f"{why} Alternative: data.test names a file of your own.")


@dataclass(frozen=True)
class EvaluationChoice:
    """`evaluation.turns` and `evaluation.limit`, and the predicted seconds of the evaluation."""

    turns: Choice
    limit: Choice
    seconds: float


def choose_evaluation(
    held_out: int, answers_each: float, answer_seconds: float, models: int, training_seconds: float
) -> EvaluationChoice:
    """Choose which answers are scored, so that the evaluation takes no longer than the training.

    Args:
        held_out: Number of held-out conversations.
        answers_each: Mean number of answers of a conversation.
        answer_seconds: Predicted seconds of generating an answer.
        models: Number of models that are scored: the base model and every checkpoint.
        training_seconds: Predicted seconds of the training.
    """
    affordable = int(training_seconds / (models * answers_each * answer_seconds))
    turns, answers = "all", answers_each
    if answers_each <= 1 or affordable < min(held_out, _SCORED):
        affordable = int(training_seconds / (models * answer_seconds))
        turns, answers = "last", 1.0
    if turns == "all":
        why = (
            f"Every answer of a held-out conversation is scored ({answers_each:.1f} each), since every answer is "
            "trained. Alternative: last."
        )
    elif answers_each > 1:
        why = f"Only the last answer of a conversation is scored: all ({answers_each:.1f} each) would take too long."
    else:
        why = "A conversation has one answer."
    limit, limited = None, "All held-out conversations are scored."
    if affordable < held_out:
        limit = min(held_out, max(ENOUGH_TEST_ROWS, affordable // 10 * 10))
        limited = f"{limit:,} of about {held_out:,} held-out conversations are scored, "
        if limit > affordable:
            limited += f"since fewer give no interval, although the {models} models then take longer than the training."
        else:
            limited += f"so that the evaluation of {models} models takes no longer than the training."
        limited += " Alternative: null scores all." if limit < held_out else ""
    scored = held_out if limit is None else limit
    seconds = scored * answers * answer_seconds * models
    return EvaluationChoice(Choice(turns, why), Choice(limit, limited), seconds)


def sizes_of_run(lengths: np.ndarray, supervised: np.ndarray, max_length: int, rows: int) -> Sizes:
    """Return the lengths of `rows` training rows, as those of the sample, repeated or cut off."""
    tokens = np.minimum(np.resize(lengths, rows), max_length)
    return Sizes(tokens.astype(np.int64), np.clip(np.resize(supervised, rows), 1, tokens).astype(np.int64))


def count_text(number: float) -> str:
    """Return a number of parameters as text, such as 135M or 7.2B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(int(number))


def percent(share: float) -> str:
    """Return a share as text; a share that would be written as 0 % has more digits."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.001 else f"{100 * share:.2g} %"


def rate_text(value: float) -> str:
    """Return a learning rate as text, such as 2e-4."""
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _one_digit(value: float) -> float:
    return float(f"{value:.0e}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
