"""Messages and progress in the terminal.

rich takes text such as `[/INST]` for markup, and a terminal obeys control characters: text that is not ours is escaped.

One display at a time is redrawn at the bottom of a terminal, on stderr: a table or a bar, and below it what is being
waited for. Messages appear above it. Where stderr is no terminal, or one that cannot move its cursor (TERM=dumb),
nothing is redrawn, and lines are printed now and then.
"""

import contextlib
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from minisft.text import printable, wrap_words


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
    # Both consoles are the same terminal: only the one with the display knows how to print above it.
    above = _shown is not None and console.is_terminal
    _print(error_console if above else console, text, style)


def warn(text: str) -> None:
    """Print a warning on stderr, so that it does not mix with piped output."""
    _print(error_console, text, "yellow")


def _print(target: Console, text: str, style: str | None) -> None:
    """Print one message; in a terminal its lines end between words."""
    shown = printable(text)
    target.print(escape(wrap_words(shown, target.width) if target.is_terminal else shown), style=style)


# --- what is redrawn in place --------------------------------------------------------------------------------

_REDRAWS = 4  # per second


class Display:
    """What is redrawn in place.

    Args:
        body: A table or a bar; None: nothing.
        waiting_for: What is being waited for, such as "loading the model"; "": nothing.
    """

    def __init__(self, body: RenderableType | None, waiting_for: str) -> None:
        self.body, self.waiting_for = body, waiting_for
        self._spinner: Spinner | None = None

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        if self.body is not None:
            yield self.body
        if self.waiting_for:
            self._spinner = self._spinner or Spinner("line" if options.ascii_only else "dots", style="cyan")
            self._spinner.update(text=Text(printable(self.waiting_for), no_wrap=True, overflow="ellipsis"))
            yield self._spinner


_shown: Display | None = None


def redraws() -> bool:
    """Return whether stderr is a terminal in which a display can be redrawn, and this process may do that.

    Of the processes that a launcher started, only the first one may, and no process that this program started.
    """
    is_first = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
    return is_first and error_console.is_interactive and error_console.file.isatty() and not error_console.quiet


@contextlib.contextmanager
def display(body: RenderableType | None = None, waiting_for: str = "", *, keep: bool = False) -> Iterator[Display]:
    """Show a display until the block ends; inside another one, change that one until the block ends.

    Args:
        body: A table or a bar.
        waiting_for: What is being waited for.
        keep: Leave the last state in the terminal when the block ends.
    """
    global _shown
    if _shown is not None:
        before = _shown.body, _shown.waiting_for
        _shown.body, _shown.waiting_for = body or _shown.body, waiting_for
        try:
            yield _shown
        finally:
            _shown.body, _shown.waiting_for = before
        return
    shown = Display(body, waiting_for)
    if not redraws():
        yield shown
        return
    stderr, in_terminal = sys.stderr, sys.stdout.isatty()
    live = Live(
        shown,
        console=error_console,
        transient=not keep,
        refresh_per_second=_REDRAWS,
        redirect_stdout=in_terminal,  # what goes to a file or a pipe stays there
    )
    with live, _log_above(stderr):
        _shown = shown
        try:
            yield shown
        finally:
            _shown = None
            shown.waiting_for = ""


def waiting(text: str) -> contextlib.AbstractContextManager[Display]:
    """Show in a terminal what is being waited for, until the block ends; for every wait of more than two seconds."""
    return display(waiting_for=text)


@contextlib.contextmanager
def _log_above(stderr: object) -> Iterator[None]:
    """Let log handlers that hold `stderr` print above the display, which has taken the place of `sys.stderr`."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    moved = [one for one in handlers if isinstance(one, logging.StreamHandler) and one.stream is stderr]
    for handler in moved:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in moved:
            handler.setStream(stderr)  # type: ignore[arg-type]


_LINE_INTERVAL = 10.0  # seconds between two lines where nothing is redrawn


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
    with display(waiting_for="reading the data") as shown:

        def show(done: int) -> None:
            nonlocal printed
            shown.waiting_for = f"{done:,} rows {done_word}"
            now = clock()
            if not redraws() and now - printed >= _LINE_INTERVAL:
                printed = now
                error_console.print(shown.waiting_for, markup=False)

        yield show


@contextlib.contextmanager
def answer_progress(name: str, total: int, unit: str = "answers") -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of answers that there are since the last call: a bar, or lines.

    Args:
        name: Name of the bar.
        total: Number of answers that are expected.
        unit: What is counted, in the plural.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    done, printed = 0, time.monotonic()
    bar = Progress(*columns, console=error_console)
    task = bar.add_task(name, total=total)
    with display(bar):

        def advance(answers: int) -> None:
            nonlocal done, printed
            done += answers
            bar.update(task, advance=answers)
            if not redraws() and (done == total or time.monotonic() - printed > _LINE_INTERVAL):
                printed = time.monotonic()
                error_console.print(f"{name}: {done} of {total} {unit}", markup=False)

        yield advance
