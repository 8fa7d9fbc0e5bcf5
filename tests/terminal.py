"""A command in a terminal of 100 x 40 characters, and what stands on its screen."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyte

COLUMNS, LINES = 100, 40


@dataclass
class Session:
    """What a command wrote, the screens that differed, and its exit status."""

    raw: bytes = b""
    screens: list[str] = field(default_factory=list)
    scrolled: list[str] = field(default_factory=list)
    status: int = 0

    @property
    def last(self) -> str:
        return self.screens[-1]


def run_in_terminal(
    words: Sequence[object],
    environment: dict[str, str] | None = None,
    seconds: float = 120,
    on_screen: Callable[[str, int], object] = lambda screen, process: None,
) -> Session:
    """Run `python WORDS` with stdout and stderr in a pseudo-terminal.

    Args:
        words: What follows `python`.
        environment: Variables to set.
        seconds: When to give up.
        on_screen: Called with each new screen and the id of the process.
    """
    screen = pyte.HistoryScreen(COLUMNS, LINES, history=1000)
    stream = pyte.ByteStream(screen)
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update({"TERM": "xterm-256color", "LANG": "C.UTF-8", **(environment or {})})
        os.execv(sys.executable, [sys.executable, *map(str, words)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    session, deadline = Session(), time.monotonic() + seconds
    while True:
        assert time.monotonic() < deadline, session.screens
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the process ended
            break
        session.raw += data
        stream.feed(data)
        shown = "\n".join(line.rstrip() for line in screen.display).rstrip()
        if not session.screens or session.last != shown:
            session.screens.append(shown)
            on_screen(shown, process)
    session.status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    session.scrolled = ["".join(cell.data for _, cell in sorted(line.items())) for line in screen.history.top]
    return session
