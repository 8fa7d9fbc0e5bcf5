"""The result of a comparison in the terminal."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.console import console, say
from minisft.report.tables import comparison_table

_WIDE = 120  # characters; a narrower terminal gets scores without their intervals
_NAME = 20  # characters that a variant's name has at least


def print_comparison(found: dict[str, Any]) -> None:
    """Print the verdict's sentences and the table, the variant to take in bold."""
    heads, rows, takes = comparison_table(found, intervals=console.width >= _WIDE)
    for columns in _split(heads, rows, takes):
        console.print(_table(columns, heads, rows, takes))
    for sentence in found["verdict"]:
        say(sentence)


def _split(heads: list[str], rows: list[list[str]], takes: list[bool]) -> list[list[int]]:
    """The columns of each table: as many as the terminal has room for, and the names again before the next ones."""
    tables = [[0]]
    for column in range(1, len(heads)):
        wider = [*tables[-1], column]
        if len(wider) > 2 and _width(_table(wider, heads, rows, takes)) > console.width:
            wider = [0, column]
            tables.append(wider)
        tables[-1] = wider
    return tables


def _width(table: Table) -> int:
    """The characters that a table takes where nothing has to be cut."""
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def _table(columns: list[int], heads: list[str], rows: list[list[str]], takes: list[bool]) -> Table:
    """Figures are never cut; long names are broken where they take more than a third of the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        if column == 0:
            shown.add_column(heads[0], overflow="fold", max_width=max(_NAME, console.width // 3))
        else:
            shown.add_column(heads[column], justify="right", no_wrap=True)
    for row, take in zip(rows, takes, strict=True):
        shown.add_row(*(Text(row[column]) for column in columns), style="bold" if take else "")
    return shown
