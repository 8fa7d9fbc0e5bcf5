"""Messages and progress in the terminal. Foreign text is never taken for markup, as `[/INST]` is, or for a control."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from minisft.text import printable


class _PrintableConsole(Console):
    """A console on which no text is a control, be it in a table, a bar or a line; styles alone are."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


console: Console = _PrintableConsole(highlight=False, soft_wrap=True)
error_console: Console = _PrintableConsole(stderr=True, highlight=False, soft_wrap=True)


def say(text: str = "", style: str | None = None) -> None:
    """Print one message on stdout, as it stands."""
    console.print(escape(printable(text)), style=style)


def warn(text: str) -> None:
    """Print something that the user should know, on stderr, where it spoils no piped output."""
    error_console.print(escape(printable(text)), style="yellow")


_SILENCE = 10.0  # seconds
_REDRAWN = 0.2


@contextlib.contextmanager
def row_progress(clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int], None]]:
    """Give a function that is called with the number of rows done so far.

    Args:
        clock: Returns seconds; rows are not printed more often than every few of them.
    """
    printed = clock()
    with error_console.status("reading") if error_console.is_terminal else contextlib.nullcontext() as status:

        def show(done: int) -> None:
            nonlocal printed
            now = clock()
            if now - printed < (_REDRAWN if status else _SILENCE):
                return
            printed = now
            if status:
                status.update(f"{done:,} rows prepared")
            else:
                error_console.print(f"{done:,} rows prepared", markup=False)

        yield show


class Progress:
    """A context; `advance` is called with the number of answers that came.

    Args:
        name: what the bar is called.
        total: answers to come.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.printed = name, total, 0, time.monotonic()

    def __enter__(self) -> "Progress":
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Bar(*columns, console=error_console, transient=True, disable=not error_console.is_terminal)
        self.task = self.bar.add_task(self.name, total=self.total)
        self.bar.start()
        return self

    def advance(self, answers: int) -> None:
        self.done += answers
        self.bar.update(self.task, advance=answers)
        if not error_console.is_terminal and (self.done == self.total or time.monotonic() - self.printed > _SILENCE):
            self.printed = time.monotonic()
            error_console.print(f"{self.name}: {self.done} of {self.total} answers", markup=False)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
