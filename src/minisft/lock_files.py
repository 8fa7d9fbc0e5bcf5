"""Locks for file systems without flock(2), such as Lustre mounted without it, or NFS without a lock daemon.

A file that is created exclusively names the host and the process that holds the lock. The kernel does not remove it
when that process is killed, so the next process on the same host does, once it sees that the holder is gone; a process
on another host cannot know that, and asks the user.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.manifest import record_files

_LARGEST = 4096  # bytes of a lock file that are read


def lock_file(path: Path) -> Path:
    """Return the file that stands for the lock file `path`."""
    return path.with_name(f"{path.name}.held")


@contextlib.contextmanager
def hold_lock_file(path: Path, deadline: float, retry: float) -> Iterator[None]:
    """Hold the lock `path` by a file beside it, which is removed at the end.

    Args:
        path: Path of the lock.
        deadline: Value of `time.monotonic()` until which to wait for another holder.
        retry: Seconds between two tries.

    Raises:
        BlockingIOError: Another process of this host holds the lock.
        UserError: A process of another host holds it, or held it when it was killed.
    """
    held, own = lock_file(path), {"host": socket.gethostname(), "process": os.getpid(), "started": _start(os.getpid())}
    record_files(held)
    while not _create(held, own):
        holder = _holder(held)
        if holder is not None and _is_gone(holder):
            _remove_left_over(held, holder)
        elif time.monotonic() <= deadline:
            time.sleep(retry)
        elif holder is not None and holder.get("host") == own["host"]:
            raise BlockingIOError(f"{held} exists")
        else:
            by = "a process" if holder is None else f"process {holder.get('process')} on {holder.get('host')}"
            problem = f"{by} is at work here, or was killed: this file system has no locks that would tell"
            raise UserError(path.parent, problem, f"wait for it; if it is gone, delete {held}")
    try:
        yield
    finally:
        held.unlink(missing_ok=True)


def is_lock_file_held(path: Path) -> bool:
    """Return whether a process holds the lock `path` by a file; one of another host may be gone."""
    held = lock_file(path)
    holder = _holder(held)
    return held.exists() if holder is None else not _is_gone(holder)


def _create(held: Path, holder: dict[str, Any]) -> bool:
    """Create the file, or return False where it exists."""
    try:
        handle = os.open(held, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123 (a handle)
        json.dump(holder, file)
    return True


def _holder(held: Path) -> dict[str, Any] | None:
    """Return who holds the lock; None where nobody does any more, or the file is not written completely."""
    try:
        handle = os.open(held, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # no link, no pipe
        with open(handle, "rb") as file:  # noqa: PTH123 (a handle)
            holder = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return None
    return holder if isinstance(holder, dict) else None


def _is_gone(holder: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this host that has ended; its number may belong to another by now."""
    process = holder.get("process")
    return holder.get("host") == socket.gethostname() and (
        not isinstance(process, int) or _start(process) != holder.get("started")
    )


def _start(process: int) -> float | None:
    """Return the time at which a process of this host started; None if there is none."""
    import psutil

    try:
        return float(psutil.Process(process).create_time())
    except psutil.Error:
        return None


def _remove_left_over(held: Path, holder: dict[str, Any]) -> None:
    """Remove the file of a process that has ended, and no other: a third process may have taken the lock meanwhile."""
    moved = held.with_name(f"{held.name}.{os.getpid()}")
    record_files(moved)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        held.rename(moved)
        if _holder(moved) == holder:
            moved.unlink()
        else:
            moved.rename(held)
