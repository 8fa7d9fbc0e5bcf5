"""The result of a comparison in the terminal."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.console import console, say
from minisft.report.tables import comparison_table

_WIDE = 120  # characters; a narrower terminal gets scores without their intervals


def print_comparison(found: dict[str, Any]) -> None:
    """Print the verdict's sentences and the table, the variant to take in bold."""
    heads, rows, takes = comparison_table(found, intervals=console.width >= _WIDE)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        shown.add_column(head, justify="right" if head else "left", no_wrap=True)
    for row, take in zip(rows, takes, strict=True):
        shown.add_row(*map(Text, row), style="bold" if take else "")
    console.print(shown)
    for sentence in found["verdict"]:
        say(sentence)
