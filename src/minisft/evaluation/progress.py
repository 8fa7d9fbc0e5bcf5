"""How far a model's answers are: a bar on a terminal, a line now and then elsewhere."""

import time

from minisft.console import error_console

_SILENCE = 10.0  # seconds


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
