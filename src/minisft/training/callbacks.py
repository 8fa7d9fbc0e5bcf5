"""Callbacks of the Trainer: metrics.jsonl, the progress display, held-out loss, and stopping at the end of a step.

In each step every process reports whether it was asked to stop, and all of them act on the same result: if one of
them left alone, the others would wait for it for ever. The launcher asks the processes that `launch` started through a
file: elastic sends SIGTERM to the other workers of a dead worker too, and those must end (`training.distributed`).
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from minisft.console import Display, display, error_console, redraws, warn
from minisft.files import write_atomically
from minisft.manifest import record_files
from minisft.monitoring.progress_table import ProgressTable, step_line
from minisft.processes import handle_stop_signals
from minisft.training.batching import StepSampler

if TYPE_CHECKING:
    from minisft.training.source_losses import SourceLosses


LOGGED = (
    "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "seconds", "peak_memory_mb",
    "communication_mb",
)  # fmt: skip
_SECONDS_BETWEEN_LINES = 10.0


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and an incomplete last one, so that a resumed run has one line per step."""
    record_files(path)
    if not path.exists():
        path.unlink(missing_ok=True)  # a dangling link: appending would create a file at its target
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))


class MetricsFile(TrainerCallback):
    """Append a line to `metrics.jsonl` for every logged step; a held-out loss goes into the line of its step."""

    def __init__(self, path: Path, sources: "SourceLosses | None" = None) -> None:
        self.path = path
        self.sources = sources
        self._line: dict[str, Any] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._line = {"step": state.global_step, "epoch": state.epoch, **{key: logs.get(key) for key in LOGGED}}
            if self.sources is not None:
                self._line["sources"] = self.sources.logged
            if control.should_evaluate:
                return  # the line is written once it is known
        elif "eval_loss" in logs:
            self._line |= {key: logs[key] for key in ("eval_loss", "eval_seconds")}
        else:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._line) + "\n")


class ShowProgress(TrainerCallback):
    """Show the steps: a table that is redrawn in a terminal, else a line now and then.

    Args:
        title: The first line of the table.
    """

    def __init__(self, title: str) -> None:
        self.table = ProgressTable(title)
        self.display: Display | None = None
        self.printed = 0.0
        self.started = 0.0
        self.first_step = 0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table until the block ends; the last state of it stays."""
        with display(waiting_for="preparing the first step", keep=True) as self.display:
            yield

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        self.table.step, self.table.last_step = state.global_step, state.max_steps
        if self.display is not None:
            self.display.body, self.display.waiting_for = self.table, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = {"step": state.global_step, "epoch": state.epoch, **logs}
        self.table.add(line)
        if redraws():
            return
        if "eval_loss" in logs:
            told = f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}"
            error_console.print(told, markup=False, highlight=False)
        if "loss" not in logs:
            return
        # A line every few seconds, and one for the last step.
        now = time.perf_counter()
        if now - self.printed >= _SECONDS_BETWEEN_LINES or state.global_step >= state.max_steps:
            self.printed = now
            pace = (now - self.started) / max(state.global_step - self.first_step, 1)
            left = pace * (state.max_steps - state.global_step)
            error_console.print(step_line(line, state.max_steps, left), markup=False)


class RestoreSampler(TrainerCallback):
    """Restore what the Trainer does not restore: the epoch of the sampler, and the log and save steps of the recipe."""

    def __init__(self, sampler: StepSampler) -> None:
        self.sampler = sampler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.epoch = state.global_step // len(self.sampler)


class OnFirstStep(TrainerCallback):
    """Call a function once, after the first step that this process takes."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.call is not None:
            call, self.call = self.call, None
            call()


STOP_FILE = "MINISFT_STOP_FILE"
_ONE_REQUEST = 5.0  # seconds within which several SIGTERMs are one request


@dataclass
class StopRequest:
    """Whether this process was asked to stop, by a signal or through the launcher's file.

    Attributes:
        file: File through which the launcher's request reaches its processes.
        signalled: A signal has come.
        first: Number and time of the first SIGINT or SIGTERM: another one stops at once.
    """

    file: Path | None = None
    signalled: bool = False
    first: tuple[int, float] | None = None

    def asked(self) -> bool:
        return self.signalled or (self.file is not None and self.file.exists())

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Record a signal.

        A scheduler may send SIGUSR1 before or after its SIGTERM, to ask for the same stop: it is not counted. SLURM may
        send SIGTERM to the process itself and through srun: a second one within seconds is not counted either.

        Raises:
            KeyboardInterrupt: It is the second SIGINT or SIGTERM.
        """
        now = time.monotonic()
        if number != signal.SIGUSR1:
            if self.first is None:
                self.first = number, now
            elif not (number == self.first[0] == signal.SIGTERM and now - self.first[1] < _ONE_REQUEST):
                raise KeyboardInterrupt
        if self.signalled:
            return
        self.signalled = True
        if self.file is not None:
            self.file.touch()
        name = signal.Signals(number).name
        again = ""
        if number == signal.SIGINT:
            again = "; once more stops at once, without one"
        elif number == signal.SIGTERM:
            again = f"; another one after {_ONE_REQUEST:g} s or more stops at once, without one"
        warn(f"{name}: stopping after this step, with a checkpoint{again}")


@contextlib.contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Return the request to stop that this process listens to: the file of its launcher if it has one, else signals."""
    file = os.environ.get(STOP_FILE)
    if file is not None:
        yield StopRequest(Path(file))
        return
    request = StopRequest()
    with handle_stop_signals(request.receive):
        yield request
