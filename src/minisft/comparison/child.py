"""A verb in a process of its own: however it ends, this one goes on, and what it printed is in a file."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minisft.errors import StoppedError
from minisft.processes import die_with_parent, stop_signals

_LOOK = 0.2  # seconds between two looks at what it printed
_OWN_MESSAGE = "minisft: "  # how the command line begins an error message


@dataclass(frozen=True)
class Ended:
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


def run_verb(words: Sequence[str], log: Path, follow: Callable[[str], object]) -> Ended:
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
    with log.open("ab") as output, stop_signals(lambda number, _: asked.append(number)):
        process = subprocess.Popen(
            [sys.executable, "-m", "minisft", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            preexec_fn=die_with_parent,
        )
        try:
            _wait(process, log, begin, follow, asked)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if asked:
        raise StoppedError("stopped as asked; the same command goes on from there")
    return Ended(process.returncode, _read(log, begin)[0])


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
