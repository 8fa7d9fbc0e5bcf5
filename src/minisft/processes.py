"""What a process does about signals, and about the end of the process that started it."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def die_with_parent() -> None:
    """Ask the kernel to kill this process with its parent, which may be killed itself; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def leave(status: int) -> NoReturn:
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
def stop_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
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
