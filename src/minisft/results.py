"""Reading evaluation/results.json, and withholding intervals and p-values that too few conversations support."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_json
from minisft.metric_names import LOSS, METRICS

# With fewer held-out conversations, a bootstrap interval is too narrow and its p-value too small to report.
# Conversations count, not answers: with `turns: all` the answers of one conversation are not independent of each other.
MIN_CONVERSATIONS = 20


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
    if not _has_whole_parts(results):
        raise UserError(path, "this file is damaged (a part of it is incomplete)", fix)
    return withhold_unreliable(results)


def _has_whole_parts(results: dict[str, Any]) -> bool:
    """Return whether the test sets, retained losses, verdicts and benchmarks that the results name are complete."""
    entries = [results["base"], *results["checkpoints"], results["constant"]]
    try:
        for sizes in (*results.get("test_sets", {}).values(), results.get("together", {})):
            int(sizes.get("conversations", 0)) + int(sizes.get("answers", 0))
        whole = all(
            isinstance(one["test_sets"][name], dict) for one in entries for name in results.get("test_sets", ())
        )
        whole = whole and all(isinstance(one["together"], dict) for one in entries if "test_sets" in results)
        if "retain" in results:
            str(results["retain"]["file"]), int(results["retain"]["texts"]), int(results["retain"]["tokens"])
            whole = whole and all("loss" in one["retain"] for one in entries[:-1])
        if "best_by" in results:
            whole = whole and isinstance(results["best_by"]["metric"], str) and "higher_is_better" in results["best_by"]
        for failure in results.get("failed_metrics", ()):
            str(failure["metric"]), str(failure["error"])
        if results.get("judge"):
            judge_rows(results["judge"]), str(results["judge"]["model"]), bool(results["judge"]["reliable"])
        if results.get("benchmarks"):
            benchmark_rows(results["benchmarks"]), str(results["benchmarks"]["harness"])
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        return False
    return whole


def withhold_unreliable(results: dict[str, Any]) -> dict[str, Any]:
    """Return results with `"reliable": false` and without p-values where too few conversations were scored.

    The file is written and read through this function, so that results of earlier versions, which give the number of
    answers but not of conversations, claim no more than new ones.
    """
    sizes = {name: one["conversations"] for name, one in results.get("test_sets", {}).items()}
    few = {name for name, conversations in sizes.items() if conversations < MIN_CONVERSATIONS}
    if few:
        results = _with_entries(results, lambda entry: _withhold_test_sets(entry, few))
    if results.get("together", {}).get("conversations", MIN_CONVERSATIONS) < MIN_CONVERSATIONS:
        results = _with_entries(results, lambda entry: {**entry, "together": _withhold_scores(entry["together"])})
    count = results.get("conversations", results.get("answers"))
    if count is None or count >= MIN_CONVERSATIONS:
        return results
    return {**_with_entries(results, _withhold_scores), "reliable": False}


def _with_entries(results: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return results with the entry of each model and of the constant baseline changed."""
    checkpoints = [change(entry) for entry in results["checkpoints"]]
    return {**results, **{name: change(results[name]) for name in ("base", "constant")}, "checkpoints": checkpoints}


def _withhold_test_sets(entry: dict[str, Any], few: Collection[str]) -> dict[str, Any]:
    sets = entry["test_sets"].items()
    return {**entry, "test_sets": {name: _withhold_scores(one) if name in few else one for name, one in sets}}


def _withhold_scores(entry: dict[str, Any]) -> dict[str, Any]:
    marked = {metric: _withhold(entry[metric]) for metric in score_keys(entry)}
    if "custom" in entry:
        marked["custom"] = {name: _withhold(score) for name, score in entry["custom"].items()}
    return {**entry, **marked}


def _withhold(score: dict[str, Any]) -> dict[str, Any]:
    p_values = {"p": dict.fromkeys(score["p"])} if "p" in score else {}
    return {**score, **p_values, "reliable": False}


def score_keys(entry: dict[str, Any]) -> list[str]:
    """Return the keys of the metrics in a model's entry: BLEU and chrF first, then the others in the recipe's order."""
    others = [key for key, value in entry.items() if isinstance(value, dict) and {"score", "low", "high"} <= set(value)]
    return [metric for metric in METRICS if metric in entry] + [key for key in others if key not in METRICS]


def chosen_by(results: dict[str, Any]) -> tuple[str, bool]:
    """Return the metric that chose the best checkpoint, "loss" included, and whether a higher score is better."""
    if recorded := results.get("best_by"):
        return str(recorded["metric"]), bool(recorded["higher_is_better"])
    # results of earlier versions, which knew two metrics
    metric = next((metric for metric in METRICS if metric in results["base"]), LOSS)
    return metric, metric != LOSS


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
    metric, higher = chosen_by(results)
    if best is None:
        return False
    tuned, base = score_of(best, metric), score_of(results["base"], metric)
    return tuned is not None and base is not None and (tuned < base if higher else tuned > base)


def higher_score_is_better(results: dict[str, Any], metric: str) -> bool | None:
    """Return whether a higher score is better; None: neither a higher nor a lower one is."""
    if metric in results.get("lower_is_better", ()):
        return False
    return None if metric in results.get("no_direction", ()) else True


def score_of(entry: dict[str, Any], metric: str) -> float | None:
    """Return a model's score by a metric, or its loss; None if it has none."""
    value = entry.get(metric)
    return value["score"] if isinstance(value, dict) else value


def format_p_value(p: float | None) -> str:
    """Return a p-value with three decimals, or with one significant digit if it is below 0.001; "" for None."""
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def judge_rows(judge: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Return the tables of the judge's verdicts as text: (heads, rows) of the comparisons, and of the grades."""

    def interval(entry: dict[str, Any], scale: float, digits: str) -> str:
        value = entry["win_rate"] if "win_rate" in entry else entry["score"]
        if value is None:
            return "none"
        bounds = f" [{entry['low'] * scale:{digits}}, {entry['high'] * scale:{digits}}]" if is_reliable(entry) else ""
        return f"{value * scale:{digits}}{bounds}"

    tables = []
    if pairs := judge.get("pairs"):
        heads = ["", "against", "win rate, %", "p", "won / tied / lost", "by order", "no verdict"]
        rows = [
            [
                one["model"], one["rival"], interval(one, 100, ".1f"), format_p_value(one["p"]),
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
