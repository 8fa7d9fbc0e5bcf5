"""Messages and progress in the terminal.

rich takes text such as `[/INST]` for markup, and a terminal obeys control characters: text that is not ours is escaped.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from minisft.text import printable


class _PrintableConsole(Console):
    """A console that escapes control characters in all text, also in tables and bars; only rich's own controls pass."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


# In a notebook too, lines go to stdout and stderr: rich would make a block of HTML of each.
console: Console = _PrintableConsole(highlight=False, soft_wrap=True, force_jupyter=False)
error_console: Console = _PrintableConsole(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)


def say(text: str = "", style: str | None = None) -> None:
    """Print one message on stdout, without interpreting markup."""
    console.print(escape(printable(text)), style=style)


def warn(text: str) -> None:
    """Print a warning on stderr, so that it does not mix with piped output."""
    error_console.print(escape(printable(text)), style="yellow")


# Seconds between two lines where there is no terminal, and between two updates of a line in one.
_LINE_INTERVAL, _UPDATE_INTERVAL = 10.0, 0.2


@contextlib.contextmanager
def row_progress(
    clock: Callable[[], float] = time.monotonic, done_word: str = "prepared"
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of rows prepared so far; their total is not known.

    Args:
        clock: Returns the time in seconds.
        done_word: What has been done with the rows.
    """
    printed = clock()
    with error_console.status("reading") if error_console.is_terminal else contextlib.nullcontext() as status:

        def show(done: int) -> None:
            nonlocal printed
            now = clock()
            if now - printed < (_UPDATE_INTERVAL if status else _LINE_INTERVAL):
                return
            printed = now
            if status:
                status.update(f"{done:,} rows {done_word}")
            else:
                error_console.print(f"{done:,} rows {done_word}", markup=False)

        yield show


@contextlib.contextmanager
def answer_progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of answers that were just generated: a bar, or a line now and then.

    Args:
        name: Name of the bar.
        total: Number of answers to generate.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    done, printed = 0, time.monotonic()
    with Progress(*columns, console=error_console, transient=True, disable=not error_console.is_terminal) as bar:
        task = bar.add_task(name, total=total)

        def advance(answers: int) -> None:
            nonlocal done, printed
            done += answers
            bar.update(task, advance=answers)
            if not error_console.is_terminal and (done == total or time.monotonic() - printed > _LINE_INTERVAL):
                printed = time.monotonic()
                error_console.print(f"{name}: {done} of {total} answers", markup=False)

        yield advance
