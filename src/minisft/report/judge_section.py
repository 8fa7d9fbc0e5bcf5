"""The sections with the judge's verdicts and the benchmarks, for the page and for results.md."""

from dataclasses import dataclass
from html import escape
from typing import Any

from minisft.report.html import scrolling_table
from minisft.results import MIN_CONVERSATIONS, benchmark_rows, judge_rows


@dataclass(frozen=True)
class TableSection:
    """A section of tables.

    Args:
        key: Its id on the page.
        title: Its title.
        tables: (heads, rows of cells) of each table.
        notes: What a reader has to know of the tables.
    """

    key: str
    title: str
    tables: list[tuple[list[str], list[list[str]]]]
    notes: str

    def as_html(self) -> str:
        tables = "".join(
            scrolling_table(self.key, heads, [(cells, False) for cells in rows]) for heads, rows in self.tables
        )
        return f'<h2 id="{self.key}">{escape(self.title)}</h2>\n{tables}<p class="soft">{escape(self.notes)}</p>\n'


def judge_tables(results: dict[str, Any]) -> TableSection | None:
    """Return the win rates and grades; None where nothing was judged."""
    judge = results.get("judge")
    if not judge:
        return None
    notes = [f"Judged by {judge['model']}."]
    if judge.get("pairs"):
        notes.append(
            "Every pair of answers was judged in both orders: an answer wins if it is preferred in both, all else is a "
            "tie (by order: the place decided), and a tie is half a win."
        )
    if judge.get("rubric"):
        notes.append(f"The rubric: {judge['rubric']}")
    if not judge["reliable"]:
        notes.append(f"Fewer than {MIN_CONVERSATIONS} conversations support neither an interval nor a p-value.")
    if judge.get("unjudged"):
        notes.append(f"{judge['unjudged']:,} questions have no verdict: {judge['problem'][0]}.")
    return TableSection("judge", "A judge's verdicts", judge_rows(judge), " ".join(notes))


def benchmark_tables(results: dict[str, Any]) -> TableSection | None:
    """Return the scores of the benchmarks; None where none were run."""
    benchmarks = results.get("benchmarks")
    if not benchmarks:
        return None
    note = f"By lm-evaluation-harness {benchmarks['harness']}: score ± standard error, and the difference to base."
    return TableSection("benchmarks", "Benchmarks", [benchmark_rows(benchmarks)], note)
