"""The sections of the page with the judge's verdicts and the benchmarks."""

from html import escape
from typing import Any

from minisft.report.html import scrolling_table
from minisft.results import MIN_CONVERSATIONS, benchmark_rows, judge_rows


def judge_section(results: dict[str, Any]) -> str:
    """Return the tables of win rates and grades; "" where nothing was judged."""
    judge = results.get("judge")
    if not judge:
        return ""
    tables = "".join(
        scrolling_table("judge", heads, [(cells, False) for cells in rows]) for heads, rows in judge_rows(judge)
    )
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
    return f'<h2 id="judge">A judge\'s verdicts</h2>\n{tables}<p class="soft">{escape(" ".join(notes))}</p>\n'


def benchmark_section(results: dict[str, Any]) -> str:
    """Return the table of the benchmarks; "" where none were run."""
    benchmarks = results.get("benchmarks")
    if not benchmarks:
        return ""
    heads, rows = benchmark_rows(benchmarks)
    note = f"By lm-evaluation-harness {benchmarks['harness']}: score ± standard error, and the difference to base."
    return (
        f'<h2 id="benchmarks">Benchmarks</h2>\n{scrolling_table("benchmarks", heads, [(row, False) for row in rows])}'
        f'<p class="soft">{escape(note)}</p>\n'
    )
