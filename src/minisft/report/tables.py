"""Tables as text cells, for the terminal, the pages and Markdown: a run's scores, and a comparison's figures."""

from typing import Any

from minisft.metric_names import METRIC_NAMES, metric_title
from minisft.report.run_data import RunFiles, metrics_of
from minisft.results import (
    best_label,
    chosen_by,
    format_p_value,
    higher_score_is_better,
    is_below_base,
    is_reliable,
    score_keys,
    score_of,
)

_RIVALS = ("base", "constant", "best")  # the systems that every other one is tested against


def score_table(run: RunFiles) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """Return the scores of the base model, every checkpoint and the constant baseline.

    Too few held-out conversations give no p-values; none give neither scores nor a constant baseline.

    Returns:
        The heads, and the rows: (cells, whether the row is the best checkpoint).
    """
    assert run.results is not None
    metrics, best = metrics_of(run), run.results["best"]
    rivals = _RIVALS if metrics and is_reliable(run.results) else ()
    tested = tested_metric(run)

    # 1. The heads.
    heads = ["", "step", "loss", "perplexity", *(metric_title(metric) for metric in metrics)]
    heads += [f"p: {rival}" for rival in rivals]
    has_exact = bool(metrics) and "exact_match" not in metrics  # else it has a column of its own
    heads += [*(["exact"] if has_exact else []), *run.results["base"].get("custom", {})]
    retained = "retain" in run.results
    heads += [*(["retained loss"] if retained else []), "seconds"]

    # 2. A row for each system; the constant baseline has scores, but neither a step nor a loss.
    rows = []
    for name, entry in [*run.systems, *([("constant", run.results["constant"])] if metrics else [])]:
        below = name == best and is_below_base(run.results)
        p_values = entry[tested].get("p", {}) if metrics else {}
        cells = [
            f"{name} ({best_label(run.results)})" if below else name,
            entry.get("step"),
            entry.get("loss"),
            entry.get("perplexity"),
            *(format_metric(metric, entry.get(metric)) for metric in metrics),
            *(format_p_value(p_values.get(rival)) for rival in rivals),
            *([f"{100 * (score_of(entry, 'exact_match') or 0):.0f} %"] if has_exact else []),
            *(format_score(score, digits=".4g") for score in entry.get("custom", {}).values()),
            *([format_retained(entry.get("retain"))] if retained else []),
            entry.get("seconds"),
        ]
        texts = ["" if cell is None else f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        rows.append((texts, name == best))
    return heads, rows


def directed_title(results: dict[str, Any], metric: str) -> str:
    """Return the metric's name, and its direction where a higher score is not better."""
    direction = {True: "", False: " (lower is better)", None: " (neither is better)"}
    return metric_title(metric) + direction[higher_score_is_better(results, metric)]


def tested_metric(run: RunFiles) -> str:
    """Return the metric whose p-values the table shows: the one that chose the best checkpoint, or else the first."""
    metrics = metrics_of(run)
    chosen = chosen_by(run.results)[0] if run.results is not None else ""
    return chosen if chosen in metrics else next(iter(metrics), "")


def test_set_tables(run: RunFiles) -> list[tuple[str, list[str], list[tuple[list[str], bool]]]]:
    """Return title, heads and rows of a table for each test set after the first, and for all of them together."""
    if run.results is None or "test_sets" not in run.results:
        return []
    systems = [*run.systems, ("constant", run.results["constant"])]
    tables = []
    for name, sizes in [*list(run.results["test_sets"].items())[1:], ("", run.results["together"])]:
        entries = [(system, entry["test_sets"][name] if name else entry["together"]) for system, entry in systems]
        metrics = score_keys(entries[0][1])
        heads = ["", "loss", *map(metric_title, metrics)]
        rows = [
            (
                [
                    system,
                    "" if entry.get("loss") is None else f"{entry['loss']:.4g}",
                    *(format_metric(metric, entry[metric]) for metric in metrics),
                ],
                system == run.results["best"],
            )
            for system, entry in entries
        ]
        title = f"Test set {name}" if name else "All test sets together"
        tables.append((f"{title}: {sizes['answers']:,} held-out answers", heads, rows))
    return tables


def format_retained(retain: dict[str, Any] | None) -> str:
    """Return the loss on the texts of `evaluation.retain`, with its difference to the base model."""
    if not retain or retain["loss"] is None:
        return ""
    difference = retain.get("difference")
    return f"{retain['loss']:.4f}" + (f" ({difference['loss']:+.4f})" if difference else "")


def format_score(score: dict[str, Any] | None, interval: bool = True, digits: str = ".1f") -> str:
    """Return a score, with its confidence interval in brackets if it is wanted and reliable."""
    if score is None:
        return ""
    text = format(score["score"], digits)
    return f"{text} [{score['low']:{digits}}, {score['high']:{digits}}]" if interval and is_reliable(score) else text


def format_metric(metric: str, score: dict[str, Any] | None, interval: bool = True) -> str:
    """Return a score with the digits of its metric: BLEU and chrF go from 0 to 100."""
    return format_score(score, interval, ".1f" if metric in METRIC_NAMES else ".4g")


def comparison_table(
    comparison: dict[str, Any], intervals: bool = True
) -> tuple[list[str], list[list[str]], list[bool]]:
    """Return the figures of a comparison's variants; a column without any figure is left out.

    Args:
        comparison: The content of comparison.json.
        intervals: Whether scores are shown with their confidence intervals.

    Returns:
        The heads, the rows of cells, and for each row whether its variant is one to take.
    """
    variants = comparison["variants"]
    figures = {  # head: (key, format, factor)
        "s/step": ("seconds_per_step", "{:.2f}", 1),
        "tokens/s": ("supervised_tokens_per_second", "{:,.0f}", 1),
        "GB": ("peak_memory_mb", "{:.2f}", 1e-3),
        "MB sent": ("communication_mb", "{:,.1f}", 1),
        "final loss": ("final_loss", "{:.4f}", 1),
        "test loss": ("test_loss", "{:.4f}", 1),
    }
    columns = {
        head: ["" if variant.get(key) is None else form.format(variant[key] * factor) for variant in variants]
        for head, (key, form, factor) in figures.items()
    }
    for metric in dict.fromkeys(key for variant in variants for key in variant.get("scores", {})):
        scores = [variant.get("scores", {}).get(metric) for variant in variants]
        columns[metric_title(metric)] = [format_metric(metric, score, intervals) for score in scores]
    columns["best"] = ["below base" if variant.get("below_base") else "" for variant in variants]
    # The largest relative difference of loss and gradient norm from the first variant of the same trajectory.
    distances = [variant.get("against") for variant in variants]
    columns["differs"] = [f"{max(d['loss'], d['grad_norm']):.1e}" if d is not None else "" for d in distances]

    names = [v["name"] if v["status"] == "done" else f"{v['name']} ({v['status']})" for v in variants]
    shown = {head: column for head, column in columns.items() if any(column)}
    rows = [list(row) for row in zip(names, *shown.values(), strict=True)]
    return ["", *shown], rows, [variant["name"] in comparison["take"] for variant in variants]


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown; a bar inside a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
