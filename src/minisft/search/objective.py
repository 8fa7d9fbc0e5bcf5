"""What a search optimizes on the validation rows: the loss, or a metric of the answers, by `--objective NAME`.

A metric is computed as `minisft evaluate` computes it: the same prompts, decoding loop and metric code. What is kept of
it is what its bootstrap needs: sacrebleu's counts of each answer, or the number of each answer.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.errors import UserError
from minisft.metric_names import LOSS, METRICS, MetricSpec, higher_is_better, parse_metrics
from minisft.recipe import Recipe
from minisft.search.rung_losses import read_losses
from minisft.search.statistics import CorpusScores, RowMeans, TrialScores

if TYPE_CHECKING:
    from minisft.evaluation.metrics import Score

_WHERE = "--objective"


@dataclass(frozen=True)
class Objective:
    """What a search optimizes.

    Args:
        key: `loss`, or the metric's key in results.json.
        higher_is_better: Whether a higher value is better.
        metric: Its entry in `evaluation.metrics`; None: the loss.
    """

    key: str = LOSS
    higher_is_better: bool = False
    metric: str | Mapping[str, Any] | None = None


def read_objective(name: str, recipe: Recipe) -> Objective:
    """Return the objective that a name stands for: `loss`, a metric, or the key of an entry of `evaluation.metrics`.

    Raises:
        UserError: There is no such metric, it cannot be computed here, or neither a higher nor a lower value is better.
    """
    if name == LOSS:
        return Objective()
    entries = recipe.evaluation.metrics
    named = {spec.key: (spec, entry) for spec, entry in zip(parse_metrics(entries), entries, strict=True)}
    if name not in named:
        try:
            named[name] = (parse_metrics([name])[0], name)
        except UserError as error:
            fix = f"{error.fix}; an entry of evaluation.metrics with a name can be named too; or {LOSS}"
            raise UserError(f"{_WHERE} {name}", error.problem, fix) from None
    spec, entry = named[name]
    better = _direction(spec)
    if better is None:
        problem = f"neither a higher nor a lower {spec.metric} is better"
        raise UserError(f"{_WHERE} {name}", problem, f"choose {LOSS} or another metric")
    return Objective(spec.key, better, entry)


def _direction(spec: MetricSpec) -> bool | None:
    if spec.metric in METRICS:
        return higher_is_better(spec.metric)
    from minisft.evaluation.row_metrics import load_row_metrics

    return load_row_metrics([spec])[0].higher_is_better


def with_objective(recipe: Recipe, objective: Objective) -> Recipe:
    """Return the recipe with the objective among its metrics, so that the test rows are scored by it too."""
    settings = recipe.evaluation
    if objective.metric is None or objective.key in [spec.key for spec in parse_metrics(settings.metrics)]:
        return recipe
    entry = objective.metric if isinstance(objective.metric, str) else dict(objective.metric)
    return replace(recipe, evaluation=replace(settings, metrics=[*settings.metrics, entry]))


def compute_score(recipe: Recipe, run: Path, model: tuple[str, Path], entry: Any, answers: Path) -> "Score":
    """Have a model answer the held-out prompts of a run, and return its score.

    Args:
        recipe: The run's recipe.
        run: The run folder.
        model: Name of the model, NAME-STEP, and its folder.
        entry: The metric's entry in `evaluation.metrics`.
        answers: Folder for the answers, which are not computed twice.

    Raises:
        UserError: The metric failed, or `evaluation.max_new_tokens` leaves no room for a prompt.
    """
    from minisft.evaluation.run_evaluation import score_model

    settings = replace(recipe.evaluation, metrics=[entry], best_by=None, prompts=None, retain=None, processes=1)
    scored, failures = score_model(replace(recipe, evaluation=settings), run, *model, answers)
    for error in failures.values():
        raise error
    return scored.scores[parse_metrics([entry])[0].key]


def write_score(path: Path, score: "Score", seconds: float) -> None:
    """Write what the bootstrap of a score needs, complete or not at all, with the seconds that computing it took."""
    from minisft.evaluation.metrics import CorpusScore

    numbers: dict[str, Any] = {"values": np.array(score.rows())}
    if isinstance(score, CorpusScore):
        numbers = {"counts": score.counts}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, seconds=np.array(seconds), **numbers)
    temporary.replace(path)


def read_scores(path: Path, trial: int, objective: Objective) -> TrialScores:
    """Read the losses or the scores of a trial at a rung."""
    if objective.metric is None:
        return read_losses(path, trial)
    from minisft.evaluation.metrics import CorpusScore

    with np.load(path) as content:
        if "values" in content:
            return RowMeans(trial, content["values"], objective.higher_is_better)
        score = CorpusScore.from_counts(objective.key, content["counts"])
    return CorpusScores(trial, score.score, score.resamples, len(score), objective.higher_is_better)


def number_text(value: float, objective: str) -> str:
    """Return an objective as text: two digits after the point for BLEU and chrF, which end at 100, otherwise four."""
    return f"{value:.2f}" if objective in METRICS else f"{value:.4f}"


def objective_text(trial: Mapping[str, Any], objective: str) -> str:
    """Return the objective of a trial with its interval, as far as it has them."""
    value, low, high = (trial.get(key) for key in ("objective", "low", "high"))
    if value is None or not math.isfinite(value):
        return ""
    text = number_text(value, objective)
    if low is None or high is None:
        return text
    return f"{text} [{number_text(low, objective)}, {number_text(high, objective)}]"
