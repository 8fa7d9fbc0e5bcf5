"""Take steps of a run again, from a checkpoint with optimizer state or from the beginning, in a scratch folder.

The steps are those of training: the same trainer with the same data, in as many processes under the same strategy. On a
CPU in fp32 they give the same bits. Nothing is written to the run.
"""

import contextlib
import gc
import io
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from minisft.checking.scratch import quiet_consoles, quiet_libraries
from minisft.errors import StoppedError, UserError
from minisft.recipe import Recipe
from minisft.row_losses import read_row_losses
from minisft.run_folder import (
    TRUST_OPTION,
    RunFolder,
    load_run,
    read_kernels,
    read_metrics,
    step_of,
    trust_arguments,
    write_resolved_recipe,
)
from minisft.training.certificate import precision_of
from minisft.training.checkpoints import has_state, read_metadata
from minisft.training.device import on_cpu
from minisft.training.distributed import launch
from minisft.training.integrity import require_intact
from minisft.training.run_training import make_trainer, require_feasible, take_steps
from minisft.training.zero import ZERO_STAGES, set_deepspeed_environment

_WORKER = "minisft.audit.replay"
_NEVER = 1 << 30  # steps between two checkpoints: the replay writes none of its own accord


@dataclass(frozen=True)
class Start:
    """Where a replay can start: after `step`, at a checkpoint with optimizer state, or at step 0 without one."""

    step: int
    checkpoint: Path | None

    def __str__(self) -> str:
        return "the beginning" if self.checkpoint is None else self.checkpoint.name


@dataclass(frozen=True)
class Replay:
    """The steps that were taken again.

    Args:
        metrics: The lines that metrics.jsonl would have, by step; a step whose loss is not finite has none.
        row_losses: Records of `row_losses.RECORD`.
        weights: Folder of the weights before the last step, if they were asked for; None: those of the base model.
    """

    metrics: dict[int, dict[str, Any]]
    row_losses: np.ndarray
    weights: Path | None = None

    def rows_of(self, step: int) -> np.ndarray:
        return rows_of_step(self.row_losses, step)


def rows_of_step(records: np.ndarray, step: int) -> np.ndarray:
    """Return the records of one step, ordered by row."""
    found = records[records["step"] == step]
    return found[np.argsort(found["row"], kind="stable")]


def list_starts(run: RunFolder) -> list[Start]:
    """Return where replays of a run can start, in the order of the steps."""
    checkpoints = [path for path in run.list_checkpoints() if has_state(path)]
    return [Start(0, None), *(Start(step_of(path), path) for path in checkpoints)]


def nearest_start(run: RunFolder, step: int) -> Start:
    """Return the last start before a step."""
    return [start for start in list_starts(run) if start.step < step][-1]


def announcement(run: RunFolder, start: Start, last: int, more: int = 0) -> str:
    """Return which steps a replay takes, and how long that takes by the median of the logged steps.

    Args:
        run: The run.
        start: Where the replay starts.
        last: Its last step.
        more: Number of steps that take as long as what follows the replay.
    """
    text = f"replaying steps {start.step + 1} to {last} from {start}"
    seconds = [line["seconds"] for line in read_metrics(run) if isinstance(line.get("seconds"), int | float)]
    if not seconds:
        return text
    about = max(1, round((last - start.step + more) * statistics.median(seconds)))
    return f"{text}: about {about} s, and the time to load the model"


def layout_of(run: RunFolder, step: int) -> tuple[str, int] | None:
    """Return the strategy and the number of processes that took a step; None: no later checkpoint says it.

    The first checkpoint at or after a step does; a run may have been resumed under another strategy.
    """
    later = [checkpoint for checkpoint in run.list_checkpoints() if step_of(checkpoint) >= step]
    return read_metadata(later[0]) if later else None


def replay_recipe(run: RunFolder, recipe: Recipe, step: int, folder: Path) -> Recipe:
    """Return the recipe of a replay that ends with `step`: the layout that took the step, and no output but losses."""
    training = recipe.training
    global_batch = training.global_batch
    strategy, processes = layout_of(run, step) or (training.strategy, training.processes)
    same = processes == training.processes
    changed: dict[str, Any] = {
        "strategy": strategy,
        "processes": processes,
        "sequence_parallel": training.sequence_parallel if same else 1,
        "batch_size": training.batch_size if same else global_batch // processes,
        "gradient_accumulation": training.gradient_accumulation if same else 1,
        "precision": precision_of(run),
        "kernels": read_kernels(run) or training.kernels,
        "save_every": _NEVER,
        "log_every": 1,
        "eval_every": None,
        "early_stopping": None,
        "early_stopping_by": "loss",
        "keep_checkpoints": None,
        "report_to": [],
    }
    return replace(recipe, output=str(folder), training=replace(training, **changed))


@contextlib.contextmanager
def scratch_run(run: RunFolder) -> Iterator[RunFolder]:
    """Yield a temporary run folder with the data of a run, which is not copied."""
    with tempfile.TemporaryDirectory(prefix="minisft-") as folder:
        scratch = RunFolder(Path(folder) / "run")
        scratch.root.mkdir()
        scratch.dataset.symlink_to(run.dataset.resolve(), target_is_directory=True)
        yield scratch


def replay(
    run: RunFolder, recipe: Recipe, scratch: RunFolder, start: Start, last: int, *, with_weights: bool = False
) -> Replay:
    """Take the steps after `start` up to `last` again.

    Args:
        run: The run.
        recipe: Its recipe.
        scratch: Folder of `scratch_run`, in which nothing was replayed yet.
        start: Where to start.
        last: The last step to take.
        with_weights: Keep the weights before the last step.

    Raises:
        UserError: This machine cannot take the steps, or the checkpoint is damaged.
        StoppedError: SIGINT or SIGTERM came.
    """
    assert start.step < last
    replayed = replay_recipe(run, recipe, last, scratch.root)
    require_feasible(replayed)
    if start.checkpoint is not None:
        require_intact(start.checkpoint)
    write_resolved_recipe(scratch, replayed)
    save_at = last - 1 if with_weights and last - 1 > start.step else 0
    training = replayed.training
    try:
        if training.processes == 1 and training.strategy not in ZERO_STAGES:
            _take_steps(replayed, scratch, start.checkpoint, last, save_at)
        else:
            checkpoint = "" if start.checkpoint is None else str(start.checkpoint.resolve())
            words = [str(scratch.root), checkpoint, str(last), str(save_at), *trust_arguments(recipe)]
            if launch(_WORKER, words, training.processes):
                raise StoppedError("stopped as asked")
    except UserError:
        if not scratch.row_losses.is_file() or not len(rows_of_step(read_row_losses(scratch.row_losses), last)):
            raise  # else its loss is not finite, as training said too
    weights = start.checkpoint if save_at == 0 else scratch.checkpoints / f"checkpoint-{save_at}"
    lines = {line["step"]: line for line in read_metrics(scratch)}
    return Replay(lines, read_row_losses(scratch.row_losses), weights)


# --- in the processes -------------------------------------------------------------------------------------


def _take_steps(recipe: Recipe, scratch: RunFolder, checkpoint: Path | None, last: int, save_at: int) -> None:
    """Take the steps in this process; one of several where it was launched.

    Raises:
        StoppedError: The replay was asked to stop.
    """
    set_deepspeed_environment(on_cpu())
    # DeepSpeed prints the extensions that it built, and stdout may have to be JSON.
    with quiet_consoles(), quiet_libraries(), contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(recipe, scratch, checkpoint)
        transformers_logging.set_verbosity_error()  # the Trainer has set it, for all processes but the first
        trainer.args.save_only_model = trainer.saves_invalid_weights = True
        trainer.add_callback(_StopAfter(last, save_at))
        take_steps(trainer, scratch, checkpoint)
        reached = trainer.state.global_step
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
    if reached < last:
        raise StoppedError("stopped as asked")


class _StopAfter(TrainerCallback):
    """End after a step, and save at another one only; 0: never."""

    def __init__(self, last: int, save_at: int) -> None:
        self.last, self.save_at = last, save_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == self.save_at
        control.should_training_stop |= state.global_step >= self.last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = False


def main() -> None:
    from minisft.training.distributed import run_worker

    root, checkpoint, last, save_at, *options = sys.argv[1:]

    def work() -> None:
        import torch

        recipe = load_run(Path(root), trust_remote_code=TRUST_OPTION in options)
        _take_steps(recipe, RunFolder(Path(root)), Path(checkpoint) if checkpoint else None, int(last), int(save_at))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    run_worker(work)


if __name__ == "__main__":
    main()
