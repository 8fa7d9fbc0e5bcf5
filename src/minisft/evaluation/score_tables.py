"""The tables of scores that `evaluate` prints."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.console import console, say
from minisft.metric_names import METRIC_NAMES, metric_title
from minisft.results import best_label, chosen_by, is_reliable, score_keys, unreliability_reason

_WIDE = 100  # characters; a narrower terminal shows neither perplexity nor seconds
_BETWEEN, _EDGES = 3, 2  # characters between two columns, and at both ends of a line


def print_table(results: dict[str, Any]) -> None:
    """Print the scores of all models, the best one marked, with 95 % intervals if there are enough conversations."""
    if not results["answers"]:
        say("There are no held-out conversations, so nothing is scored.")
        _print_retained(results)
        for failure in results["failed"]:
            say(f"{failure['checkpoint']}: {_failure(failure)}", style="yellow")
        return
    # 1. The first test set, with the loss, BLEU and chrF.
    turns = "the last answer of each conversation" if results["turns"] == "last" else "all answers"
    sets = results.get("test_sets", {})
    of_set = f" of {next(iter(sets))}" if sets else ""
    columns = [
        "loss",
        "perplexity",
        *(metric for metric in METRIC_NAMES if metric in results["base"]),
        *_exact(results["base"]),
        "seconds",
    ]
    if console.width < _WIDE:
        columns = [column for column in columns if column not in ("perplexity", "seconds")]
    intervals = ", 95 % intervals" * is_reliable(results)
    console.print(Text(f"{results['answers']} held-out replies{of_set} ({turns}){intervals}:"))
    table = _table(results, _systems(results), columns)
    for failure in results["failed"]:
        table.add_row(Text(failure["checkpoint"]), Text(_failure(failure)), style="yellow")
    console.print(table)
    if reason := unreliability_reason(results):
        say(f"{reason}.")
    console.print(Text.assemble("constant: always ", repr(results["constant"]["text"])))
    # 2. The other metrics.
    _print_more(results, _systems(results))
    # 3. The other test sets, and all of them together.
    systems = _systems(results)
    for name, sizes in list(sets.items())[1:]:
        of_this_set = [(system, entry["test_sets"][name]) for system, entry in systems]
        _print_set(results, f"{sizes['answers']} held-out replies of {name}:", of_this_set)
    if sets:
        title = f"{results['together']['answers']} held-out replies of all test sets together:"
        _print_set(results, title, [(system, entry["together"]) for system, entry in systems])
    # 4. The texts of `evaluation.retain`.
    _print_retained(results)
    metric, higher = chosen_by(results)
    if results["best"] is not None and metric != "bleu":
        say(f"best: by the {'highest' if higher else 'lowest'} {metric_title(metric)}")


def _systems(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = [("base", results["base"]), *((c["checkpoint"], c) for c in results["checkpoints"])]
    return [*rows, ("constant", results["constant"])]


def _print_set(results: dict[str, Any], title: str, systems: Sequence[tuple[str, dict[str, Any]]]) -> None:
    columns = ["loss", *(metric for metric in METRIC_NAMES if metric in systems[0][1]), *_exact(systems[0][1])]
    console.print(Text(title))
    console.print(_table(results, systems, columns))
    _print_more(results, systems)


def _exact(entry: dict[str, Any]) -> list[str]:
    """Return the column of exact matches; none where the recipe names the metric, which has its own column then."""
    return [] if "exact_match" in score_keys(entry) else ["exact"]


def _print_more(results: dict[str, Any], systems: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print the metrics besides BLEU and chrF, in as many tables as the width of the terminal needs."""
    entry = systems[0][1]
    more = [key for key in score_keys(entry) if key not in METRIC_NAMES] + list(entry.get("custom", {}))
    widths = [max(map(len, [metric_title(key), *(_cell(key, one) for _, one in systems)])) for key in more]
    for part in fitting_columns(max(len(name) for name, _ in systems), widths):
        console.print(_table(results, systems, more[part]))


def fitting_columns(first: int, widths: Sequence[int]) -> Iterator[slice]:
    """Yield the columns of each of several tables, as many as fit into the terminal beside a first one; at least one.

    Args:
        first: Width of the first column, which every table has.
        widths: Widths of the others.
    """
    start, used = 0, first + _EDGES
    for place, width in enumerate(widths):
        if place > start and used + _BETWEEN + width > console.width:
            yield slice(start, place)
            start, used = place, first + _EDGES
        used += _BETWEEN + width
    if widths:
        yield slice(start, len(widths))


def _print_retained(results: dict[str, Any]) -> None:
    """Print the loss on the texts of `evaluation.retain`, and its difference to the base model."""
    if "retain" not in results:
        return
    about = results["retain"]
    console.print(Text(f"Loss on {about['texts']} texts of {about['file']} ({about['tokens']:,} tokens):"))
    systems = [(name, entry) for name, entry in _systems(results) if "retain" in entry]
    console.print(_table(results, systems, ["retained loss", "above base"]))


def _table(results: dict[str, Any], systems: Sequence[tuple[str, dict[str, Any]]], columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(Text(metric_title(column)), justify="right", no_wrap=True)
    for name, entry in systems:
        best = name == results["best"]
        cells = [f"{name} ({best_label(results)})" if best else name, *(_cell(column, entry) for column in columns)]
        table.add_row(*map(Text, cells), style="bold" if best else "")
    return table


def _failure(failure: dict[str, Any]) -> str:
    return "removed" if failure.get("removed") else "damaged"


def _cell(column: str, entry: dict[str, Any]) -> str:
    """Return the text of a model's score in one column."""
    if column == "exact":
        share = entry["exact_match"]  # of the shape of `bleu` where the recipe names the metric
        return f"{100 * (share['score'] if isinstance(share, dict) else share):.0f} %"
    if column == "retained loss":
        return with_interval(entry["retain"], "loss", ".4f")
    if column == "above base":
        return with_interval(entry["retain"].get("difference", {}), "loss", "+.4f", entry["retain"])
    value = entry.get("custom", {}).get(column, entry.get(column))
    if isinstance(value, dict):
        return with_interval(value, "score", ".1f" if column in METRIC_NAMES else ".4g")
    return "" if value is None else f"{value:,.{ {'loss': 4, 'perplexity': 2, 'seconds': 1}[column] }f}"


def with_interval(value: dict[str, Any], key: str, digits: str, reliable: dict[str, Any] | None = None) -> str:
    """Return a number with its interval in brackets, where it has one that is reliable; "" if there is no number."""
    if value.get(key) is None:
        return ""
    text = format(value[key], digits)
    if not is_reliable(value if reliable is None else reliable):
        return text
    return f"{text} [{value['low']:{digits}}, {value['high']:{digits}}]"
