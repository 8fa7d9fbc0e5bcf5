"""DeepSpeed's communication on a CPU, compiled once in a process of its own: `python -m minisft.training.compilation`.

A process of its own can be stopped at any moment, with the compilers that it started; inside this one, Ctrl-C would
wait for them.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable

from minisft.errors import StoppedError
from minisft.processes import die_with_parent, stop_signals

_COMMAND = ("-m", "minisft.training.compilation")


def compile_apart(clean_up: Callable[[], object]) -> str | None:
    """Compile the op, and wait for it; SIGINT and SIGTERM end it at once.

    Args:
        clean_up: called once nothing is at work any more.

    Returns:
        Why it failed, or None.

    Raises:
        StoppedError: this process was asked to stop.
    """
    with stop_signals(_stop):
        process = subprocess.Popen(
            [sys.executable, *_COMMAND], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            printed, _ = process.communicate()
        finally:
            if process.poll() is None:
                _kill_with_children(process.pid)
            process.wait()
            clean_up()
    if process.returncode == 0:
        return None
    lines = [line for line in printed.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"it ended with status {process.returncode}"


def _kill_with_children(pid: int) -> None:
    """Kill a process and the compilers below it, to which ninja gives process groups of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _stop(number: int, frame: object) -> None:
    raise StoppedError(f"stopped while DeepSpeed's communication was compiled ({signal.Signals(number).name})")


def main() -> None:
    from minisft.training.strategies import build_communication

    build_communication()


if __name__ == "__main__":
    main()
