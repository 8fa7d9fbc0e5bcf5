"""What a run gained and lost against its base model, its test sets one by one, and the texts of `evaluation.retain`."""

from dataclasses import dataclass
from html import escape
from typing import Any

from minisft.metric_names import metric_title
from minisft.report.html import scrolling_table
from minisft.report.run_data import RunFiles
from minisft.report.tables import format_metric, format_p_value, test_set_tables
from minisft.results import higher_score_is_better, is_reliable, score_keys

SIGNIFICANCE = 0.05  # the p-value below which a difference counts as more than chance


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
        is_clear: Whether the difference is more than chance; None: too few conversations or texts to say.
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
        verdict = {True: self.evidence, False: f"{self.evidence}: may be chance", None: "too few to say"}[self.is_clear]
        return [self.name, f"{self.base} to {self.tuned}", self.difference, verdict]


def changes(run: RunFiles) -> list[Change]:
    """Return how the best checkpoint differs from the base model, in every score and in the retained loss.

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
    found.append(_retained_change(run.results, base, best))
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
        "" if p is None else f"p = {format_p_value(p)}",
        None if p is None else p < SIGNIFICANCE,
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
        f"[{low:+.4f}, {high:+.4f}]" if reliable else "",
        (low > 0 or high < 0) if reliable else None,
    )


def gains_section(run: RunFiles) -> str:
    """Return the page's section on gains and losses, side by side, and the tables of the test sets; "" for none."""
    parts = []
    found = changes(run)
    if found and run.results is not None:
        heads = ["", f"base to {run.results['best']}", "difference", "chance?"]
        columns = []
        for title, better in (("Gained", True), ("Lost", False)):
            rows = [(one.cells, False) for one in found if one.better is better]
            shown = scrolling_table(title.lower(), heads, rows) if rows else '<p class="soft">nothing</p>'
            columns.append(f'<div><h3 id="{title.lower()}">{title}</h3>{shown}</div>')
        note = ""
        if "retain" in run.results:
            about = run.results["retain"]
            note = (
                f'<p class="soft">{escape(about["file"])}: {about["texts"]:,} texts of evaluation.retain, '
                f"{about['tokens']:,} tokens; the interval is that of the difference, over texts.</p>"
            )
        parts.append(f'<h2 id="gains">Gained and lost</h2>\n<div class="pair">{"".join(columns)}</div>{note}\n')
    for number, (title, heads, rows) in enumerate(test_set_tables(run)):
        name = f"test-set-{number}"
        parts.append(f'<h3 id="{name}">{escape(title)}</h3>\n{scrolling_table(name, heads, rows)}\n')
    return "".join(parts)
