"""What a training step reports: `metrics.jsonl`, and the line that the user watches."""

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from minisft.console import error_console
from minisft.files import write_atomically
from minisft.manifest import record
from minisft.training.communication import bytes_sent

LOGGED = (
    "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "seconds", "peak_memory_mb",
    "communication_mb",
)  # fmt: skip
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class StepMetrics:
    """Tokens of a step, over all processes; when it began (`time.perf_counter`), and what had been sent by then."""

    tokens: int = 0
    supervised_tokens: int = 0
    started: float = 0.0
    sent_before: float = 0.0

    def as_logs(self) -> dict[str, float]:
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "seconds": time.perf_counter() - self.started,
            "communication_mb": (bytes_sent() - self.sent_before) / 1e6,
        }


def peak_memory_mb() -> float:
    """Return the most memory this process has held: of the GPU where there is one, else resident, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def keep_steps_up_to(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a torn last one, so that a resumed run has one line a step."""
    record(path)
    if not path.exists():
        path.unlink(missing_ok=True)  # a link to nowhere: what is appended would make a file there
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

    def __init__(self, path: Path) -> None:
        self.path = path
        self._line: dict[str, Any] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._line = {"step": state.global_step, "epoch": state.epoch, **{key: logs.get(key) for key in LOGGED}}
            if control.should_evaluate:
                return  # the line waits for it
        elif "eval_loss" in logs:
            self._line |= {key: logs[key] for key in ("eval_loss", "eval_seconds")}
        else:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._line) + "\n")


class ProgressLine(TrainerCallback):
    """A progress bar with loss, supervised tokens a second, memory and time left; plain lines elsewhere."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TextColumn("left"), TimeRemainingColumn(), console=error_console,
        )  # fmt: skip
        self.printed = 0.0
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.perf_counter(), state.global_step
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, status="")
        if error_console.is_terminal:
            self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            told = f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}"
            error_console.print(told, markup=False, highlight=False)
        if "loss" not in logs:
            return
        status = (
            f"epoch {state.epoch:.2f}  loss {logs['loss']:.4f}  "
            f"{logs['supervised_tokens'] / logs['seconds']:.0f} supervised tokens/s  "
            f"{logs['peak_memory_mb'] / 1000:.2f} GB"
        )
        self.progress.update(self.task, completed=state.global_step, status=status)
        if not error_console.is_terminal:
            self._print_line(state, status)

    def stop(self) -> None:
        if self.progress.live.is_started:  # else it would print an empty line
            self.progress.stop()

    def _print_line(self, state: Any, status: str) -> None:
        """Where there is no terminal, a line now and then, and one for the last step."""
        now = time.perf_counter()
        if now - self.printed < _SECONDS_BETWEEN_LINES and state.global_step < state.max_steps:
            return
        self.printed = now
        pace = (now - self.started) / max(state.global_step - self.first_step, 1)
        left = pace * (state.max_steps - state.global_step)
        error_console.print(f"step {state.global_step}/{state.max_steps}  {status}  {left:.0f} s left", markup=False)
