"""What it costs to keep the loss of every training row: time of a step, and bytes of a row and epoch.

    python benchmarks/row_losses.py --steps 60            # the demo's model and conversations
    python benchmarks/row_losses.py --model FOLDER --batch-size 16

One training takes all steps with the same conversations, and keeps the losses of rows in every second step only, so
that both kinds of steps do the same work under the same load. The ratio of their median times is the cost. Steps of a
busy machine differ by more than that, so processor time is measured too, to which other processes add nothing: that of
the code of the row losses, which has one thread, times the number of threads, as a share of that of the whole step. If
all threads were busy throughout, this would be its share of the step's duration; otherwise it is above that share.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from minisft.data.preparation import prepare
from minisft.recipe import load_recipe
from minisft.row_losses import HEADER
from minisft.run_folder import RunFolder, write_resolved_recipe
from minisft.training.batching import PackedRow
from minisft.training.run_training import make_trainer, take_steps
from minisft.training.step_row_losses import RowLossBuffer

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
WARM_UP = 4  # steps that are not counted


class TimedBuffer(RowLossBuffer):
    """Adds up the seconds of processor time that its methods take."""

    seconds = 0.0

    def start_step(self, step: int, rows: tuple[int, ...], device: torch.device) -> None:
        self.timed(super().start_step, step, rows, device)

    def add(self, row: PackedRow, losses: torch.Tensor) -> None:
        self.timed(super().add, row, losses)

    def timed(self, call: Callable[..., Any], *args: Any) -> Any:
        started = time.thread_time()
        try:
            return call(*args)
        finally:
            self.seconds += time.thread_time() - started


class NoBuffer(RowLossBuffer):
    """Keeps nothing."""

    def start_step(self, step: int, rows: tuple[int, ...], device: torch.device) -> None:
        return

    def add(self, row: PackedRow, losses: torch.Tensor) -> None:
        return


class EverySecondStep(TrainerCallback):
    """Keep the losses of rows in every second step only, and time every step, the writing included.

    Attributes:
        steps: (whether the losses were kept, seconds of the step, processor time of all its threads, processor time of
            the code of row losses).
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.steps = trainer, list[tuple[bool, float, float, float]]()
        self.kept, self.nothing, self.started = TimedBuffer(), NoBuffer(), (0.0, 0.0)
        write = trainer._write_row_losses
        trainer._write_row_losses = lambda: self.kept.timed(write)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._row_losses = self.nothing if state.global_step % 2 else self.kept
        self.kept.seconds, self.started = 0.0, (time.perf_counter(), time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:  # the trainer has written the losses of rows before
            keeps = self.trainer._row_losses is self.kept
            seconds, processor = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
            self.steps.append((keeps, seconds, processor, self.kept.seconds))


def measure(model: str | None, batch_size: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train, and return the medians of the steps with and without the losses of rows."""
    words = [
        f"output={folder / 'run'}", f"data.limit={batch_size}", "data.test_fraction=0", f"training.max_steps={steps}",
        f"training.batch_size={batch_size}", "training.save_every=1000000000", *([f"model={model}"] if model else []),
    ]  # fmt: skip
    recipe, run = load_recipe(DEMO, words), RunFolder(folder / "run")
    prepare(recipe)
    write_resolved_recipe(run, recipe)
    trainer = make_trainer(recipe, run)
    timer = EverySecondStep(trainer)
    trainer.add_callback(timer)
    take_steps(trainer, run)
    counted = timer.steps[WARM_UP:]
    with_losses = [one for one in counted if one[0]]
    seconds = {
        "with": statistics.median(one[1] for one in with_losses),
        "without": statistics.median(one[1] for one in counted if not one[0]),
    }
    threads = torch.get_num_threads()
    rows = sum(one[0] for one in timer.steps) * batch_size
    return {
        "steps": len(counted),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "ratio": round(seconds["with"] / seconds["without"], 4),
        "share_of_processor_time": round(threads * statistics.median(one[3] / one[2] for one in with_losses), 6),
        "threads": threads,
        "bytes_per_row_and_epoch": (run.row_losses.stat().st_size - len(HEADER)) / rows,
        "processor": platform.processor() or platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations of a step")
    parser.add_argument("--steps", type=int, default=60, help="steps to take, the first few of which do not count")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments.model, arguments.batch_size, arguments.steps, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
