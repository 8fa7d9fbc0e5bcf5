"""Why a process was killed: what the kernel says of memory, where it can be read."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from minisft.errors import UserError, WorkerError

_LOG = Path("/dev/kmsg")
_CGROUPS = Path("/sys/fs/cgroup")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_FIX = (
    "give it more memory, or use less: a smaller training.row_tokens, training.gradient_checkpointing=true, fewer "
    "processes or a ZeRO stage (`minisft plan RECIPE` says what each needs); then go on with --resume"
)


class MemoryKills:
    """The kernel's count of processes that it killed for memory, from the moment that this is made."""

    def __init__(self) -> None:
        self.before = _count()
        self.began = time.monotonic()

    def evidence(self, pid: int) -> str | None:
        """Return the kernel's own words that it killed a process for memory, or None."""
        for line in _log_since(self.began):
            if f"Killed process {pid} " in line:
                return line
        if _count() > self.before:
            return "the memory limit of its control group was reached (oom_kill in memory.events)"
        return None


def killed_worker(rank: int, processes: int, signal_name: str, pid: int, kills: MemoryKills) -> Exception:
    """Return the error to raise where a signal ended a process.

    Returns:
        A UserError where the kernel says that memory was short, else a WorkerError that calls it likely for SIGKILL.
    """
    who = f"rank {rank} of {processes} process{'es' if processes > 1 else ''}"
    if signal_name != "SIGKILL":
        return WorkerError(f"a training process failed: {who} died of {signal_name}; --resume goes on")
    evidence = kills.evidence(pid)
    if evidence is not None:
        return UserError(who, f"the kernel killed it (SIGKILL), since memory ran out: {evidence}", _FIX)
    return WorkerError(
        f"a training process failed: {who} was killed (SIGKILL); unless somebody did that, memory is the likely "
        f"reason: {_FIX}"
    )


def _count() -> int:
    """Add up what the control groups of this process have counted, version 2 or 1."""
    counts = [_COUNT.search(text) for text in _cgroup_files()]
    return sum(int(found[1]) for found in counts if found)


def _cgroup_files() -> Iterator[str]:
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield _read(_CGROUPS / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            yield _read(_CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control")


def _log_since(began: float) -> Iterator[str]:
    """Yield the kernel's messages since a moment of the monotonic clock; none where they may not be read."""
    try:
        log = os.open(_LOG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    try:
        while True:
            try:
                record = os.read(log, 8192).decode(errors="replace")
            except BrokenPipeError:  # it was overwritten meanwhile: the next read gives a later one
                continue
            head, _, message = record.partition(";")
            if float(head.split(",")[2]) / 1e6 >= began:
                yield message.splitlines()[0]
    except (OSError, IndexError, ValueError):  # the end, or another format
        return
    finally:
        os.close(log)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
