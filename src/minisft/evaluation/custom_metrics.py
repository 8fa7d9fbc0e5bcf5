"""Metrics that give one number per answer: one mechanism for those with a name, of a module, and of the Python API."""

import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minisft.errors import UserError
from minisft.evaluation.metrics import MeanScore
from minisft.metric_names import METRICS

# Called with outputs, references and prompts, one text of each per answer; returns one number per answer.
CustomMetric = Callable[[list[str], list[str], list[str]], Sequence[float]]

CUSTOM = "custom."  # before the key of a metric of the Python API, whose scores are in `custom`
_RESERVED_NAMES = (*METRICS, "loss", "perplexity", "exact", "seconds", "step", "p")  # columns of the tables


@dataclass(frozen=True)
class RowMetric:
    """A metric that gives one number per answer.

    Args:
        key: Its key in results.json; after `CUSTOM`, its key in `custom`.
        function: Gives the numbers.
        where: Its name in error messages.
        signature: What the numbers are.
        higher_is_better: None: neither a higher nor a lower score is.
    """

    key: str
    function: CustomMetric
    where: str
    signature: str
    higher_is_better: bool | None = True

    def score(
        self, system: str, outputs: Sequence[str], references: Sequence[str], prompts: Sequence[str]
    ) -> MeanScore:
        """Return the mean over one model's answers.

        Args:
            system: Name of the model, for error messages.
            outputs: The model's answers.
            references: The reference of each answer.
            prompts: The prompt of each answer, as text.

        Raises:
            UserError: The function failed, or did not return one finite number per answer.
        """
        where = f"{self.where} on {system}"
        try:
            given = self.function(list(outputs), list(references), list(prompts))
        except UserError as error:
            raise UserError(where, error.problem, error.fix) from None
        except Exception as error:
            problem = f"the metric failed ({type(error).__name__}: {error})"
            raise UserError(where, problem, "correct the function; the answers are kept") from error
        return MeanScore(_check_values(given, len(outputs), where), self.signature)


def as_row_metrics(metrics: Mapping[str, CustomMetric], taken: Collection[str] = ()) -> list[RowMetric]:
    """Return the metrics of the Python API.

    Args:
        metrics: Functions by name.
        taken: The keys of the recipe's metrics.

    Raises:
        UserError: A name is not an identifier or is reserved, or a metric cannot be called.
    """
    if not isinstance(metrics, Mapping):
        raise UserError("metrics", "this is not a dict", 'give functions by name, such as {"length_ratio": f}')
    for name, metric in metrics.items():
        where = f"metrics[{name!r}]"
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(where, "this name is not an identifier", "use letters, digits and underscores")
        if name in _RESERVED_NAMES or name in taken:
            raise UserError(where, "MiniSFT has a score of this name", "choose another name")
        if not callable(metric):
            raise UserError(
                where, "this is not a function", "give f(outputs, references, prompts) -> a list of numbers"
            )
    return [
        RowMetric(
            CUSTOM + name,
            metric,
            f"metrics[{name!r}]",
            f"metric:{name}",
            bool(getattr(metric, "higher_is_better", True)),
        )
        for name, metric in metrics.items()
    ]


def _check_values(given: Any, count: int, where: str) -> list[float]:
    """Return what a metric returned as a list of `count` finite numbers."""
    fix = f"return a list of {count} finite numbers, one for each answer"
    try:
        values = list(given)
    except TypeError:
        raise UserError(where, f"it returned a value of the type {type(given).__name__}, not a list", fix) from None
    if len(values) != count:
        numbers_text = "1 number" if len(values) == 1 else f"{len(values)} numbers"
        raise UserError(where, f"it returned {numbers_text} for {count} answers", fix)
    for number, value in enumerate(values):
        if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
            raise UserError(where, f"it returned {value!r} for answer {number}", fix)
    return [float(value) for value in values]
