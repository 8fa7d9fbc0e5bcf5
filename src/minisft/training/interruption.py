"""SIGTERM and Ctrl-C during training: save at the next step boundary, then end.

Every process says in each step whether it was asked to stop, and all of them act on the same answer: with one of
them gone, the others would wait for it for ever. Processes that `launch` started listen to their launcher alone, which
tells them through a file: elastic sends SIGTERM to the fellows of a dead worker too, and those must not linger.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from minisft.console import warn
from minisft.processes import stop_signals

STOP_FILE = "MINISFT_STOP_FILE"


@dataclass
class StopRequest:
    """Whether this process was asked to stop, by a signal or through the launcher's file."""

    file: Path | None = None
    signalled: bool = False

    def asked(self) -> bool:
        return self.signalled or (self.file is not None and self.file.exists())

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Take note of a signal.

        Raises:
            KeyboardInterrupt: it is the second one.
        """
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True
        if self.file is not None:
            self.file.touch()
        name = signal.Signals(number).name
        warn(f"{name}: stopping after this step, with a checkpoint; once more stops at once, without one")


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """What asks this process to stop: its launcher's file where it has one, else the signals."""
    file = os.environ.get(STOP_FILE)
    if file is not None:
        yield StopRequest(Path(file))
        return
    request = StopRequest()
    with stop_signals(request.receive):
        yield request
