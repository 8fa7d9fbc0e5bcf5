"""The output of libraries: control characters are escaped, and a few known notices are left out.

Only the notices listed here are suppressed; every other warning and error of a library is shown.
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
    """Pass log records, warnings and tracebacks through `printable`, in this process."""
    make_record = logging.getLogRecordFactory()
    if getattr(make_record, "escapes_output", False):
        return

    def make_escaped_record(*args: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*args, **options)
        if isinstance(record.msg, str):
            record.msg = printable(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(printable(value) if isinstance(value, str) else value for value in record.args)
        return record

    make_escaped_record.escapes_output = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_escaped_record)
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: printable(format_warning(*args, **options))
    sys.excepthook = _print_traceback


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


# By logger: how a message begins that is not worth showing, and why.
_NOTICES = {
    "transformers.trainer_utils": (
        "The tokenizer has new PAD/BOS/EOS tokens",
    ),  # checkpoints get the trained stop tokens
    "DeepSpeed": ("Setting accelerator to CPU",),  # peft imports DeepSpeed, also where nothing is trained
}
# Warnings about DeepSpeed's use of torch functions that a later version will not use.
_DEPRECATIONS = (
    r".*_?all_gather_base.*", r".*_?all_gather_into_tensor.*", r".*_?reduce_scatter_(base|tensor).*",
    r"`broadcast_buffers` is deprecated",  # transformers passes it to DDP
)  # fmt: skip


def suppress_known_warnings() -> None:
    """Suppress, in this process, the known notices that appear in a run in which nothing is wrong."""
    for name, beginnings in _NOTICES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginnings))
    for message in _DEPRECATIONS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)


class _Without(logging.Filter):
    """A filter that drops messages with certain beginnings."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


@contextlib.contextmanager
def drop_lines(part: str) -> Iterator[None]:
    """Drop the lines that contain `part` from what Python code prints on stdout inside the block."""
    with contextlib.redirect_stdout(_LineFilter(sys.stdout, part)) as stream:
        try:
            yield
        finally:
            stream.flush()


class _LineFilter(io.TextIOBase):
    """A stream that forwards complete lines, except those that contain a text."""

    def __init__(self, target: TextIO, part: str) -> None:
        self.target, self.part, self.incomplete = target, part, ""

    def write(self, text: str) -> int:
        *lines, self.incomplete = (self.incomplete + text).split("\n")
        self.target.writelines(f"{line}\n" for line in lines if self.part not in line)
        return len(text)

    def flush(self) -> None:
        if self.incomplete and self.part not in self.incomplete:
            self.target.write(self.incomplete)
        self.incomplete = ""
        self.target.flush()
