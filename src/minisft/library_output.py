"""What libraries print: control characters are escaped, and known notices are left out.

Only lines that are known here are held back; every other warning and error of a library is shown.
"""

import contextlib
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

from minisft.text import printable


def escape_library_output() -> None:
    """Let what libraries log and warn of, and tracebacks, pass through `printable` too, in this process."""
    make_record = logging.getLogRecordFactory()
    if getattr(make_record, "is_tame", False):
        return

    def make_tame_record(*args: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*args, **options)
        if isinstance(record.msg, str):
            record.msg = printable(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(printable(one) if isinstance(one, str) else one for one in record.args)
        return record

    make_tame_record.is_tame = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_tame_record)
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: printable(format_warning(*args, **options))
    sys.excepthook = _print_traceback


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


# Where a library logs it, how the message begins, and why it says nothing.
_NOTICES = {
    "transformers.trainer_utils": ("The tokenizer has new PAD/BOS/EOS tokens",),  # checkpoints get the trained stops
}
# Of DeepSpeed's use of torch, which its next version will change.
_DEPRECATIONS = (r".*_?all_gather_base.*", r".*_?all_gather_into_tensor.*", r".*_?reduce_scatter_(base|tensor).*")


def suppress_known_warnings() -> None:
    """Hold back, in this process, the notices that a run in which nothing is wrong brings about."""
    for name, beginnings in _NOTICES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(beginnings))
    for message in _DEPRECATIONS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)


class _Without(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


@contextlib.contextmanager
def drop_lines(part: str) -> Iterator[None]:
    """Hold back lines with `part` that Python code prints on stdout inside the block; others pass."""
    with contextlib.redirect_stdout(_Lines(sys.stdout, part)) as passing:
        try:
            yield
        finally:
            passing.flush()


class _Lines(io.TextIOBase):
    """Passes on whole lines but those that hold a text."""

    def __init__(self, target: TextIO, part: str) -> None:
        self.target, self.part, self.begun = target, part, ""

    def write(self, text: str) -> int:
        *whole, self.begun = (self.begun + text).split("\n")
        self.target.writelines(f"{line}\n" for line in whole if self.part not in line)
        return len(text)

    def flush(self) -> None:
        if self.begun and self.part not in self.begun:
            self.target.write(self.begun)
        self.begun = ""
        self.target.flush()
