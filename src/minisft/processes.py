"""Signals, the death of the parent process, a command in a process of its own, and how its threads wait."""

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
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # libgomp's manual: "Environment Variables"


def exit_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, even if that was killed; Linux only (prctl(2)).

    torch's elastic launcher starts workers in sessions of their own, so that a launcher that is killed would leave
    them training, beside the workers of a run that is resumed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def hard_exit(status: int) -> NoReturn:
    """End this process, whose work is done, without finalizing the interpreter.

    gloo's threads may still hold tensors of the interpreter, even after the process group is destroyed: some processes
    that had trained and saved died of SIGABRT in the finalization, and the run counted as failed
    (pytorch/pytorch#179291). As at any other exit, threads are joined, `atexit` functions run, and output is flushed.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the stream is closed, or its reader has ended
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def handle_stop_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Send SIGINT, SIGTERM and SIGUSR1 to `handler` in the block; what is ignored, as under nohup, stays ignored.

    SIGUSR1 is what batch schedulers are told to send before they end a job; without a handler it kills a process.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    before = {number: earlier for number, earlier in before.items() if earlier != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


_POLL_INTERVAL = 0.2  # seconds between two reads of what the child printed
_OWN_MESSAGE = "minisft: "  # how the command line begins an error message


@dataclass(frozen=True)
class CompletedVerb:
    """The result of a `minisft` command that ran in a process of its own.

    Args:
        status: Its exit status; minus the number of the signal where one killed it.
        printed: Its output, on stdout and stderr.
    """

    status: int
    printed: str

    @property
    def error(self) -> str:
        """The reason why it failed: its error message, or the last line that it printed."""
        if self.status < 0:
            name = signal.Signals(-self.status).name
            hint = ": often too little memory" if self.status == -signal.SIGKILL else ""
            return f"killed by {name}{hint}"
        lines = [line.rstrip() for line in self.printed.splitlines()]
        starts = [index for index, line in enumerate(lines) if line.startswith(_OWN_MESSAGE)]
        if self.status == 2 and starts:
            return "\n".join([lines[starts[-1]].removeprefix(_OWN_MESSAGE), *lines[starts[-1] + 1 :]]).strip()
        last = next((line for line in reversed(lines) if line), "it printed nothing")
        return f"exit status {self.status}: {last}"


def run_verb(words: Sequence[str], log: Path, follow: Callable[[str], object]) -> CompletedVerb:
    """Run `minisft WORDS` and wait for it; SIGINT and SIGTERM to this process stop the child, which saves its work.

    Args:
        words: Verb, recipe, overrides and options.
        log: Path of the file to append its output to.
        follow: Called with each line that it prints.

    Raises:
        StoppedError: This process was asked to stop, and the child has ended.
    """
    with log.open("ab") as file:
        file.write(f"$ minisft {' '.join(words)}\n".encode())
    begin = log.stat().st_size
    stop_signals: list[int] = []
    with log.open("ab") as output, handle_stop_signals(lambda number, _: stop_signals.append(number)):
        process = subprocess.Popen(
            [sys.executable, "-m", "minisft", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which forwards it
            preexec_fn=exit_with_parent,
        )
        try:
            _wait(process, log, begin, follow, stop_signals)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if stop_signals:
        raise StoppedError("stopped as asked; the same command resumes from there")
    return CompletedVerb(process.returncode, _read(log, begin)[0])


def _wait(
    process: "subprocess.Popen[bytes]",
    log: Path,
    position: int,
    follow: Callable[[str], object],
    stop_signals: list[int],
) -> None:
    """Pass each line that the child prints to `follow` until it ends, and each stop signal to the child."""
    forwarded, ended = 0, False
    while not ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_INTERVAL)
            ended = True
        for _ in stop_signals[forwarded:]:
            process.send_signal(signal.SIGTERM)
        forwarded = len(stop_signals)
        text, position = _read(log, position, complete_lines=not ended)
        for line in text.splitlines():
            follow(line)


def _read(log: Path, position: int, complete_lines: bool = False) -> tuple[str, int]:
    """Return the text of a log from a byte position on, if asked only its complete lines, and its end position."""
    with log.open("rb") as file:
        file.seek(position)
        content = file.read()
    if complete_lines:
        content = content[: content.rfind(b"\n") + 1]
    return content.decode("utf-8", errors="replace"), position + len(content)
