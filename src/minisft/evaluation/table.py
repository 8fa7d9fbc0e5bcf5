"""The summary of an evaluation in the terminal."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.claims import best_label, is_reliable, why_withheld
from minisft.console import console, say

_NAMES = {"bleu": "BLEU", "chrf": "chrF"}
_WIDE = 100  # characters; a narrower terminal gets neither perplexity nor seconds


def print_table(results: dict[str, Any]) -> None:
    """Base, checkpoints and constant, the best one marked; 95 % intervals, where they do not claim too much."""
    if not results["answers"]:
        say("There are no held-out conversations, so nothing is scored.")
        _say_failures(results)
        return
    rows = [("base", results["base"]), *((c["checkpoint"], c) for c in results["checkpoints"])]
    rows.append(("constant", results["constant"]))
    metrics = [metric for metric in _NAMES if metric in results["base"]]
    columns = ["loss", "perplexity", *metrics, "exact", "seconds"]
    if console.width < _WIDE:
        columns = [column for column in columns if column not in ("perplexity", "seconds")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(_NAMES.get(column, column), justify="right", no_wrap=True)
    for name, entry in rows:
        best = name == results["best"]
        cells = [f"{name} ({best_label(results)})" if best else name, *(_cell(column, entry) for column in columns)]
        table.add_row(*map(Text, cells), style="bold" if best else "")
    for failure in results["failed"]:
        table.add_row(Text(failure["checkpoint"]), Text(_failure(failure)), style="yellow")
    which = "the last answer of each conversation" if results["turns"] == "last" else "all answers"
    console.print(f"{results['answers']} held-out replies ({which}){', 95 % intervals' * is_reliable(results)}:")
    console.print(table)
    if reason := why_withheld(results):
        say(f"{reason}.")
    console.print(Text.assemble("constant: always ", repr(results["constant"]["text"])))


def _say_failures(results: dict[str, Any]) -> None:
    for failure in results["failed"]:
        say(f"{failure['checkpoint']}: {_failure(failure)}", style="yellow")


def _failure(failure: dict[str, Any]) -> str:
    return "removed" if failure.get("removed") else "damaged"


def _cell(column: str, entry: dict[str, Any]) -> str:
    if column in _NAMES:
        score = entry[column]
        interval = f" [{score['low']:.1f}, {score['high']:.1f}]" if is_reliable(score) else ""
        return f"{score['score']:.1f}{interval}"
    if column == "exact":
        return f"{100 * entry['exact_match']:.0f} %"
    value = entry.get(column)
    return "" if value is None else f"{value:,.{ {'loss': 4, 'perplexity': 2, 'seconds': 1}[column] }f}"
