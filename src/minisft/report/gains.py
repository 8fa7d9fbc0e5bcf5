"""What a run gained and lost against its base model: on its test sets, on benchmarks and on texts of its user's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from minisft.metric_names import metric_title
from minisft.report.html import scrolling_table
from minisft.report.run_data import RunFiles
from minisft.report.tables import format_metric, test_set_tables
from minisft.report.verdict import SIGNIFICANCE
from minisft.results import format_p_value, higher_score_is_better, is_reliable, score_keys

TOO_FEW = "too few to say"  # conversations or texts
_Z = 1.96  # standard errors of a difference within which 95 % of chance differences are


@dataclass(frozen=True)
class Change:
    """A score of the best checkpoint beside that of the base model.

    Args:
        name: What was measured.
        base: The base model's score, as text.
        tuned: The checkpoint's score, as text.
        difference: Checkpoint minus base.
        better: Whether the difference is an improvement.
        evidence: The p-value or the interval of the difference, as text; "" if there is none.
        is_clear: Whether the difference is more than chance; None: that cannot be said, and `evidence` says why.
    """

    name: str
    base: str
    tuned: str
    difference: str
    better: bool
    evidence: str
    is_clear: bool | None

    @property
    def cells(self) -> list[str]:
        chance = ": may be chance" if self.is_clear is False else ""
        return [self.name, f"{self.base} to {self.tuned}", self.difference, self.evidence + chance]


def changes(run: RunFiles) -> list[Change]:
    """Return how the best checkpoint differs from the base model, in every score, benchmark and the retained loss.

    Scores of which neither a higher nor a lower one is better are left out, and so are equal ones.
    """
    best = run.best
    if run.results is None or best is None:
        return []
    base = run.results["base"]
    pairs = [("", base, best)]
    if sets := run.results.get("test_sets"):
        pairs = [(f" ({name})", base["test_sets"][name], best["test_sets"][name]) for name in sets]
    found = [
        _score_change(run.results, metric, suffix, before, after)
        for suffix, before, after in pairs
        for metric in score_keys(before)
    ]
    found += [*_benchmark_changes(run.results), _retained_change(run.results, base, best)]
    return [one for one in found if one is not None]


def _score_change(
    results: dict[str, Any], metric: str, suffix: str, base: dict[str, Any], best: dict[str, Any]
) -> Change | None:
    higher = higher_score_is_better(results, metric)
    difference = best[metric]["score"] - base[metric]["score"]
    if higher is None or difference == 0:
        return None
    p = best[metric].get("p", {}).get("base")
    return Change(
        metric_title(metric) + suffix,
        format_metric(metric, base[metric], interval=False),
        format_metric(metric, best[metric], interval=False),
        f"{difference:+.4g}",
        (difference > 0) is higher,
        TOO_FEW if p is None else f"p = {format_p_value(p)}",
        None if p is None else p < SIGNIFICANCE,
    )


def _benchmark_changes(results: dict[str, Any]) -> Iterator[Change]:
    models = results.get("benchmarks", {}).get("models", {})
    for task, metrics in models.get(results["best"], {}).items():
        for metric, entry in metrics.items():
            higher, difference = entry.get("higher_is_better"), entry.get("difference")
            if higher is None or not difference:
                continue
            stderr = entry["difference_stderr"]
            yield Change(
                f"{task} {metric}",
                f"{models['base'][task][metric]['score']:.4g}",
                f"{entry['score']:.4g}",
                f"{difference:+.3g}",
                (difference > 0) is higher,
                "no standard error" if stderr is None else f"± {stderr:.2g}",
                None if stderr is None else abs(difference) > _Z * stderr,
            )


def _retained_change(results: dict[str, Any], base: dict[str, Any], best: dict[str, Any]) -> Change | None:
    before, after = base.get("retain") or {}, best.get("retain") or {}
    difference = after.get("difference")
    if difference is None or difference["loss"] == 0:
        return None
    reliable = is_reliable(after)
    low, high = difference["low"], difference["high"]
    return Change(
        f"loss on {results['retain']['file']}",
        f"{before['loss']:.4f}",
        f"{after['loss']:.4f}",
        f"{difference['loss']:+.4f}",
        difference["loss"] < 0,
        f"[{low:+.4f}, {high:+.4f}]" if reliable else TOO_FEW,
        (low > 0 or high < 0) if reliable else None,
    )


def gain_tables(run: RunFiles) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return (heads, rows) of what the best checkpoint gained and of what it lost, by their titles; {} for neither."""
    found = changes(run)
    if run.results is None or not found:
        return {}
    heads = ["", "base to best", "difference", "evidence"]
    return {
        title: (heads, [one.cells for one in found if one.better is better])
        for title, better in (("Gained", True), ("Lost", False))
    }


def evidence_notes(results: dict[str, Any]) -> str:
    """Return what the last column of these tables says about each kind of score."""
    notes = ["p is the p-value of the difference (paired bootstrap)."]
    if "benchmarks" in results:
        notes.append("After ± of a benchmark is the standard error of the difference.")
    if "retain" in results:
        about = results["retain"]
        notes.append(
            f"{about['file']}: {about['texts']:,} texts of evaluation.retain, {about['tokens']:,} tokens; in brackets "
            "is the 95 % interval of the difference, over texts."
        )
    return " ".join(notes)


def gains_section(run: RunFiles) -> str:
    """Return the page's section on gains and losses, side by side, and the tables of the test sets; "" for none."""
    parts = []
    columns = []
    for title, (heads, cells) in gain_tables(run).items():
        rows = [(row, False) for row in cells]
        shown = scrolling_table(title.lower(), heads, rows) if rows else '<p class="soft">nothing</p>'
        columns.append(f'<div><h3 id="{title.lower()}">{title}</h3>{shown}</div>')
    if columns and run.results is not None:
        note = f'<p class="soft">{escape(evidence_notes(run.results))}</p>'
        title = f"Gained and lost by {run.results['best']}"
        parts.append(f'<h2 id="gains">{escape(title)}</h2>\n<div class="pair">{"".join(columns)}</div>{note}\n')
    for number, (title, heads, rows) in enumerate(test_set_tables(run)):
        name = f"test-set-{number}"
        parts.append(f'<h3 id="{name}">{escape(title)}</h3>\n{scrolling_table(name, heads, rows)}\n')
    return "".join(parts)
