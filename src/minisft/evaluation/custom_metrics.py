"""Metrics of the caller's own: a number for each answer, their mean and its bootstrap interval."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minisft.errors import UserError
from minisft.evaluation.metrics import RESAMPLES, SEED
from minisft.recipe import METRICS

# Outputs, references and prompts, one text for each answer, to one number for each answer.
CustomMetric = Callable[[list[str], list[str], list[str]], Sequence[float]]

_TAKEN = (*METRICS, "loss", "perplexity", "exact", "seconds", "step", "p")  # columns of the tables


def check_custom_metrics(metrics: Mapping[str, CustomMetric]) -> dict[str, CustomMetric]:
    """Return the metrics as a dict.

    Raises:
        UserError: a name is no identifier or is taken, or a metric cannot be called.
    """
    if not isinstance(metrics, Mapping):
        raise UserError("metrics", "this is no dict", 'give functions by name, such as {"length_ratio": f}')
    for name, metric in metrics.items():
        where = f"metrics[{name!r}]"
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(where, "this name is no identifier", "use letters, digits and underscores")
        if name in _TAKEN:
            raise UserError(where, "MiniSFT has a score of this name", "choose another name")
        if not callable(metric):
            raise UserError(where, "this is no function", "give f(outputs, references, prompts) -> a list of numbers")
    return dict(metrics)


def score_custom(
    metrics: Mapping[str, CustomMetric],
    system: str,
    outputs: Sequence[str],
    references: Sequence[str],
    prompts: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Return {name: {"score", "low", "high", "values"}} of one model's answers.

    `score` is the mean over answers, `low` and `high` bound its 95 % interval by the resamples that BLEU and chrF have
    too, `values` are the numbers of the answers in the order of outputs.jsonl.

    Raises:
        UserError: a metric failed, or did not give one finite number for each answer; there are no answers.
    """
    if not outputs:
        raise UserError("metrics", "there are no held-out answers to score", "set data.test_fraction above 0")
    found = {}
    for name, metric in metrics.items():
        where = f"metrics[{name!r}] on {system}"
        try:
            given = metric(list(outputs), list(references), list(prompts))
        except Exception as error:
            problem = f"the metric failed ({type(error).__name__}: {error})"
            raise UserError(where, problem, "correct the function; the answers are kept") from error
        found[name] = _summary(_values(given, len(outputs), where))
    return found


def _values(given: Any, count: int, where: str) -> list[float]:
    fix = f"return a list of {count} finite numbers, one for each answer"
    try:
        values = list(given)
    except TypeError:
        raise UserError(where, f"it returned a value of the type {type(given).__name__}, no list", fix) from None
    if len(values) != count:
        raise UserError(where, f"it returned {len(values)} numbers for {count} answers", fix)
    for number, value in enumerate(values):
        if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
            raise UserError(where, f"it returned {value!r} for answer {number}", fix)
    return [float(value) for value in values]


def _summary(values: list[float]) -> dict[str, Any]:
    array = np.array(values)
    draws = np.random.default_rng(SEED).choice(len(array), size=(RESAMPLES, len(array)), replace=True)
    ordered = np.sort(array[draws].mean(axis=1))
    outside = RESAMPLES // 40
    return {
        "score": float(array.mean()),
        "low": float(ordered[outside]),
        "high": float(ordered[-outside - 1]),
        "values": values,
    }
