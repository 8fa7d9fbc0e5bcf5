"""The results in the terminal: a line as each comes, and what it came to."""

from collections.abc import Sequence

from rich.text import Text

from minisft.checking.result import Result
from minisft.console import console

_STYLES = {"ok": "green", "FAILED": "bold red", "not run": "yellow"}
_INDENT = " " * 28


def show(result: Result) -> None:
    """Print one result."""
    line = Text.assemble(
        (f"{result.status:<8} ", _STYLES[result.status]),
        f"{result.name:<18} ",
        f"{result.seconds:>5.1f} s  " if result.status != "not run" else " " * 9,
        result.claim,
    )
    console.print(line)
    console.print(Text(f"{_INDENT}{result.detail}", style="dim" if result.status == "ok" else ""))
    if result.mend:
        console.print(Text(f"{_INDENT}To mend it: {result.mend}"))


def summary(results: Sequence[Result]) -> str:
    """Say how many came out how."""
    counts = {status: sum(result.status == status for result in results) for status in _STYLES}
    seconds = sum(result.seconds for result in results)
    return f"{counts['ok']} ok, {counts['FAILED']} FAILED, {counts['not run']} not run, in {seconds:.0f} s"
