"""Writes that may fail, as on a full disk: nothing half-written stays, and all processes learn of it.

While a checkpoint is written the processes meet in collectives (gathers of ZeRO-3, DeepSpeed's barriers). One that
left them with an error would make the others wait for ever, so a failed write is noted where it happens, the others go
on, and the processes then agree on whether all of it was written.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minisft.errors import UserError
from minisft.files import REFUSED
from minisft.runs import list_checkpoints

_TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "write(): ")  # in torch.save's RuntimeErrors
_MEND = "free some room or repair the disk, then go on with --resume"


def is_write_failure(error: BaseException) -> bool:
    """Say whether an error is that of a file system that refused a write."""
    if isinstance(error, OSError):
        many = error.args[0] if error.args and isinstance(error.args[0], list) else []  # shutil.copytree's
        return error.errno in REFUSED or any(os.strerror(code) in str(one) for one in many for code in REFUSED)
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error) or "IoError" in str(error)
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITERS)


class Attempts:
    """Writes of which a failed one is noted; those after it are left out, since the whole is lost."""

    def __init__(self) -> None:
        self.failure: str | None = None

    def __call__(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `write`, and note it where the file system refuses."""
        with self:
            return write(*args, **kwargs) if self.failure is None else None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or not is_write_failure(error):
            return False
        self.failure = self.failure or reason_of(error)
        return True


@contextlib.contextmanager
def naming_failed_writes(folder: Path) -> Iterator[None]:
    """Turn an error of the file system inside the block into one that says what to do.

    TensorBoard writes in a thread, which dies with a traceback; its next write in the main thread raises the error.

    Raises:
        UserError: a write was refused.
    """
    told = threading.excepthook
    threading.excepthook = lambda died: None if _is_refused(died.exc_value) else told(died)
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        raise failed_write(folder, "writing failed", reason_of(error)) from None
    finally:
        threading.excepthook = told


def _is_refused(error: BaseException | None) -> bool:
    return error is not None and is_write_failure(error)


def failed_write(where: Path, what: str, reason: str) -> UserError:
    """Return the error of a write at or below `where` that was refused for `reason`."""
    there = next(folder for folder in (where, *where.parents) if folder.exists())
    free = size_text(shutil.disk_usage(there).free)
    return UserError(where, f"{what} ({reason}; {free} free); {what_is_left(where)}", _MEND)


def what_is_left(where: Path) -> str:
    """Say which checkpoints there are of a run that failed: at its folder, or at one or two levels below it."""
    found = (list_checkpoints(folder / "checkpoints") for folder in (where, *where.parents[:2]))
    checkpoints = next((some for some in found if some), [])
    if not checkpoints:
        return "no checkpoint was written yet"
    return f"the checkpoints written before are whole, the last of them {checkpoints[-1].name}"


def size_text(size: int) -> str:
    """Say how much `size` bytes are."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"


def reason_of(error: BaseException) -> str:
    """Return the file system's own words where the error has them."""
    text = str(error)
    known = next((os.strerror(code) for code in REFUSED if os.strerror(code) in text), None)
    if known is None and any(name in text for name in _TORCH_WRITERS):
        return "torch.save could not write all of it"
    return known or (text.strip().splitlines() or [type(error).__name__])[0]
