"""How many rows are done: a line that counts on a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from minisft.console import error_console

_SILENCE = 10.0  # seconds
_REDRAWN = 0.2


@contextlib.contextmanager
def counting_rows() -> Iterator[Callable[[int], None]]:
    """Give a function that is called with the number of rows done so far."""
    printed = time.monotonic()
    with error_console.status("reading") if error_console.is_terminal else contextlib.nullcontext() as status:

        def show(done: int) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed < (_REDRAWN if status else _SILENCE):
                return
            printed = now
            if status:
                status.update(f"{done:,} rows prepared")
            else:
                error_console.print(f"{done:,} rows prepared", markup=False)

        yield show
