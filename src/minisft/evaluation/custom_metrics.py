"""Custom metrics: functions of the caller that give a number for each answer; their mean and bootstrap interval."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minisft.errors import UserError
from minisft.evaluation.resampling import percentile_interval, resampled_rows
from minisft.recipe import METRICS

# Called with outputs, references and prompts, one text of each per answer; returns one number per answer.
CustomMetric = Callable[[list[str], list[str], list[str]], Sequence[float]]

_RESERVED_NAMES = (*METRICS, "loss", "perplexity", "exact", "seconds", "step", "p")  # columns of the tables


def check_custom_metrics(metrics: Mapping[str, CustomMetric]) -> dict[str, CustomMetric]:
    """Return the metrics as a dict.

    Raises:
        UserError: A name is not an identifier or is reserved, or a metric cannot be called.
    """
    if not isinstance(metrics, Mapping):
        raise UserError("metrics", "this is not a dict", 'give functions by name, such as {"length_ratio": f}')
    for name, metric in metrics.items():
        where = f"metrics[{name!r}]"
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(where, "this name is not an identifier", "use letters, digits and underscores")
        if name in _RESERVED_NAMES:
            raise UserError(where, "MiniSFT has a score of this name", "choose another name")
        if not callable(metric):
            raise UserError(
                where, "this is not a function", "give f(outputs, references, prompts) -> a list of numbers"
            )
    return dict(metrics)


def score_custom(
    metrics: Mapping[str, CustomMetric],
    system: str,
    outputs: Sequence[str],
    references: Sequence[str],
    prompts: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return {name: {"score", "low", "high", "values"}} of one model's answers.

    `score` is the mean over answers; `low` and `high` bound its 95 % bootstrap interval, over the same resamples as for
    BLEU and chrF; `values` are the numbers of the answers in the order of outputs.jsonl.

    Args:
        metrics: Functions by name.
        system: Name of the model, for error messages.
        outputs: The model's answers.
        references: The reference of each answer.
        prompts: The prompt of each answer, as text.

    Raises:
        UserError: A metric failed, or did not return one finite number per answer; or there are no answers.
    """
    if not outputs:
        raise UserError("metrics", "there are no held-out answers to score", "set data.test_fraction above 0")
    scores = {}
    for name, metric in metrics.items():
        where = f"metrics[{name!r}] on {system}"
        try:
            given = metric(list(outputs), list(references), list(prompts))
        except Exception as error:
            problem = f"the metric failed ({type(error).__name__}: {error})"
            raise UserError(where, problem, "correct the function; the answers are kept") from error
        values = _check_values(given, len(outputs), where)
        array = np.array(values)
        low, high = percentile_interval(array[resampled_rows(len(array))].mean(axis=1))
        scores[name] = {
            "score": float(array.mean()),
            "low": low,
            "high": high,
            "values": values,
        }
    return scores


def _check_values(given: Any, count: int, where: str) -> list[float]:
    """Return what a metric returned as a list of `count` finite numbers."""
    fix = f"return a list of {count} finite numbers, one for each answer"
    try:
        values = list(given)
    except TypeError:
        raise UserError(where, f"it returned a value of the type {type(given).__name__}, not a list", fix) from None
    if len(values) != count:
        raise UserError(where, f"it returned {len(values)} numbers for {count} answers", fix)
    for number, value in enumerate(values):
        if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
            raise UserError(where, f"it returned {value!r} for answer {number}", fix)
    return [float(value) for value in values]
