"""Signals, the death of the parent process, and a command in a process of its own."""

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from minisft.errors import StoppedError

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def exit_with_parent() -> None:
    """Ask the kernel to kill this process with its parent, which may be killed itself; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def hard_exit(status: int) -> NoReturn:
    """End this process, whose work is done, without tearing the interpreter down.

    gloo's threads may still hold tensors of it, also after the process group is destroyed; now and then a process that
    had trained and saved then died of SIGABRT, and the run counted as failed (pytorch/pytorch#179291). Threads are
    waited for, what was registered to be done at the exit is done, and output is flushed, as at any other end.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def handle_stop_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """While it lasts, SIGINT and SIGTERM go to `handler`; one that is ignored, as under nohup, stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heeded = {number: earlier for number, earlier in before.items() if earlier != signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in heeded.items():
            signal.signal(number, earlier)


_LOOK = 0.2  # seconds between two looks at what it printed
_OWN_MESSAGE = "minisft: "  # how the command line begins an error message


@dataclass(frozen=True)
class CompletedVerb:
    """How a child ended.

    Args:
        status: its exit status; minus the signal's number where one killed it.
        printed: what it wrote on stdout and stderr.
    """

    status: int
    printed: str

    @property
    def error(self) -> str:
        """Why it failed, from what it printed last."""
        if self.status < 0:
            name = signal.Signals(-self.status).name
            hint = ": often too little memory" if self.status == -signal.SIGKILL else ""
            return f"killed by {name}{hint}"
        lines = [line.rstrip() for line in self.printed.splitlines()]
        starts = [place for place, line in enumerate(lines) if line.startswith(_OWN_MESSAGE)]
        if self.status == 2 and starts:
            return "\n".join([lines[starts[-1]].removeprefix(_OWN_MESSAGE), *lines[starts[-1] + 1 :]]).strip()
        last = next((line for line in reversed(lines) if line), "it printed nothing")
        return f"exit status {self.status}: {last}"


def run_verb(words: Sequence[str], log: Path, follow: Callable[[str], object]) -> CompletedVerb:
    """Run `minisft WORDS` and wait for it; SIGINT and SIGTERM to this process stop it, with its work saved.

    Args:
        words: verb, recipe, overrides and options.
        log: the file that its output is added to.
        follow: called with each line that it prints.

    Raises:
        StoppedError: this process was asked to stop, and the child has ended.
    """
    with log.open("ab") as file:
        file.write(f"$ minisft {' '.join(words)}\n".encode())
    begin = log.stat().st_size
    asked: list[int] = []
    with log.open("ab") as output, handle_stop_signals(lambda number, _: asked.append(number)):
        process = subprocess.Popen(
            [sys.executable, "-m", "minisft", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            preexec_fn=exit_with_parent,
        )
        try:
            _wait(process, log, begin, follow, asked)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if asked:
        raise StoppedError("stopped as asked; the same command goes on from there")
    return CompletedVerb(process.returncode, _read(log, begin)[0])


def _wait(
    process: "subprocess.Popen[bytes]", log: Path, place: int, follow: Callable[[str], object], asked: list[int]
) -> None:
    """Hand over what the child prints until it ends, and each signal that comes."""
    passed_on, ended = 0, False
    while not ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK)
            ended = True
        for _ in asked[passed_on:]:
            process.send_signal(signal.SIGTERM)
        passed_on = len(asked)
        text, place = _read(log, place, whole_lines=not ended)
        for line in text.splitlines():
            follow(line)


def _read(log: Path, place: int, whole_lines: bool = False) -> tuple[str, int]:
    """Return the log's text from `place` on, up to its last whole line where wished, and where it ends."""
    with log.open("rb") as file:
        file.seek(place)
        found = file.read()
    if whole_lines:
        found = found[: found.rfind(b"\n") + 1]
    return found.decode("utf-8", errors="replace"), place + len(found)
