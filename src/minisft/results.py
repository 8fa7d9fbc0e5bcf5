"""Reading evaluation/results.json, and withholding intervals and p-values that too few conversations support."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_json
from minisft.recipe import METRICS

# With fewer held-out conversations, a bootstrap interval is too narrow and its p-value too small to report.
# Conversations count, not answers: with `turns: all` the answers of one conversation are not independent of each other.
MIN_CONVERSATIONS = 20
METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF"}  # as the field writes them


def results_path(root: Path) -> Path:
    """Return the path of a run folder's results."""
    return root / "evaluation" / "results.json"


def read_results(root: Path) -> dict[str, Any] | None:
    """Read `evaluation/results.json` of a run folder, through `withhold_unreliable`; None if it does not exist yet.

    Raises:
        UserError: The file is damaged.
    """
    path = results_path(root)
    if not path.is_file():
        return None
    fix = f"delete it and run `minisft evaluate {root}`, which writes it again: no answer is computed twice"
    types: dict[str, Any] = {"base": dict, "constant": dict, "checkpoints": list, "best": (str, type(None))}
    results = {"failed": [], **read_json(path, fix, **types)}
    if not all(isinstance(entry, dict) and "checkpoint" in entry for entry in results["checkpoints"]):
        raise UserError(path, "this file is damaged (an entry names no checkpoint)", fix)
    return withhold_unreliable(results)


def withhold_unreliable(results: dict[str, Any]) -> dict[str, Any]:
    """Return results with `"reliable": false` and without p-values where too few conversations were scored.

    The file is written and read through this function, so that results of earlier versions, which give the number of
    answers but not of conversations, claim no more than new ones.
    """
    count = results.get("conversations", results.get("answers"))
    if count is None or count >= MIN_CONVERSATIONS:
        return results
    checkpoints = [_withhold_scores(entry) for entry in results["checkpoints"]]
    systems = {name: _withhold_scores(results[name]) for name in ("base", "constant")}
    return {**results, **systems, "checkpoints": checkpoints, "reliable": False}


def _withhold_scores(entry: dict[str, Any]) -> dict[str, Any]:
    scores = {metric: entry[metric] for metric in METRICS if metric in entry}
    marked = {
        metric: {**score, "p": dict.fromkeys(score.get("p", {})), "reliable": False} for metric, score in scores.items()
    }
    if "custom" in entry:
        marked["custom"] = {name: {**score, "reliable": False} for name, score in entry["custom"].items()}
    return {**entry, **marked}


def is_reliable(score: dict[str, Any]) -> bool:
    """Return whether the interval and the p-values of one score, or of all results, may be reported."""
    return bool(score.get("reliable", True))


def unreliability_reason(results: dict[str, Any]) -> str:
    """Return the reason why results give no intervals and no p-values; "" where they give them."""
    if is_reliable(results):
        return ""
    count = results.get("conversations", results.get("answers"))
    held_out = "1 held-out conversation" if count == 1 else f"{count} held-out conversations"
    return f"{held_out}: fewer than {MIN_CONVERSATIONS} support neither an interval nor a claim of significance"


def best_label(results: dict[str, Any]) -> str:
    """Return the label of the best checkpoint: "best", or that it still scores below the base model."""
    return "best, but below base" if is_below_base(results) else "best"


def is_below_base(results: dict[str, Any]) -> bool:
    """Return whether the best checkpoint scores below the base model, by the metric that chose it."""
    best = next((entry for entry in results["checkpoints"] if entry["checkpoint"] == results["best"]), None)
    chosen_by = next((metric for metric in METRICS if best is not None and metric in best), None)
    if best is None or chosen_by is None:
        return False
    return bool(best[chosen_by]["score"] < results["base"][chosen_by]["score"])


def judge_rows(judge: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return the tables of the judge's verdicts as text: (heads, rows) of the comparisons, and of the grades."""

    def interval(entry: dict[str, Any], scale: float, digits: str) -> str:
        value = entry["win_rate"] if "win_rate" in entry else entry["score"]
        if value is None:
            return "none"
        bounds = f" [{entry['low'] * scale:{digits}}, {entry['high'] * scale:{digits}}]" if is_reliable(entry) else ""
        return f"{value * scale:{digits}}{bounds}"

    def p_value(p: float | None) -> str:
        return "" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"

    tables = []
    if pairs := judge.get("pairs"):
        heads = ["", "against", "win rate, %", "p", "won / tied / lost", "by order", "no verdict"]
        rows = [
            [
                one["model"], one["rival"], interval(one, 100, ".1f"), p_value(one["p"]),
                f"{one['wins']:,} / {one['ties']:,} / {one['losses']:,}",
                f"{one['order_decided']:,}", f"{one['invalid'] + one['unjudged']:,}",
            ]
            for one in pairs
        ]  # fmt: skip
        tables.append((heads, rows))
    if grades := judge.get("grades"):
        rows = [
            [one["model"], interval(one, 1, ".2f"), f"{one['graded']:,}", f"{one['invalid'] + one['unjudged']:,}"]
            for one in grades
        ]
        tables.append((["", "grade, 1 to 10", "graded", "no verdict"], rows))
    return tables


def benchmark_rows(benchmarks: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the benchmarks as a table of text: a row for each task and metric, a column for each model."""

    def cell(entry: Mapping[str, Any]) -> str:
        stderr = f" ± {entry['stderr']:.2g}" if entry["stderr"] is not None else ""
        return f"{entry['score']:.4g}{stderr}" + (f" ({entry['difference']:+.3g})" if "difference" in entry else "")

    models = benchmarks["models"]
    rows = [
        [f"{task} {metric}", *(cell(figures[task][metric]) for figures in models.values())]
        for task, metrics in next(iter(models.values())).items()
        for metric in metrics
    ]
    return ["", *models], rows
