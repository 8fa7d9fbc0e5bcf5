"""A few real steps of the recipe in a scratch folder, in processes of their own.

They are taken twice: once through, and once from the checkpoint after step RESUME_AT on.
"""

import contextlib
import gc
import io
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from minisft.console import console, error_console
from minisft.errors import StoppedError
from minisft.recipe import Recipe, TrainingRecipe
from minisft.run_folder import RunFolder, load_run, trust_arguments
from minisft.run_start import open_run
from minisft.training.batching import measure_lengths
from minisft.training.device import choose_precision, on_cpu
from minisft.training.distributed import launch, launch_single
from minisft.training.run_training import make_trainer, take_steps
from minisft.training.zero import ZERO_STAGES, set_deepspeed_environment

STEPS = 3
RESUME_AT = 2
_WORKER = "minisft.checking.scratch"
# Tokens of all steps together, and of one row. A step need not be large to show what it does.
_TOKENS_CPU, _TOKENS_GPU = 2400, 30000
_ROW_CPU, _ROW_GPU = 512, 2048
# Of the learning rate in half precision. AdamW's first steps are as long for a tiny gradient, which is all rounding
# there, as for a large one: at 2e-4 two right ways are 6 % apart in the loss of the third step, at 2e-5 0.2 %.
_MOST_IN_HALF_PRECISION = 2e-5


@dataclass(frozen=True)
class Steps:
    """The steps to take.

    Args:
        conversations: of a step.
        rows: of the train side, for all steps.
    """

    conversations: int
    rows: list[int]


def choose_steps(training: TrainingRecipe, train_split: Any) -> Steps:
    """Choose short rows of different lengths, and as many in a step as the recipe has where there is time for it."""
    tokens = measure_lengths(train_split).tokens
    budget = _TOKENS_CPU if on_cpu() else _TOKENS_GPU
    whole = training.batch_size * training.processes * training.gradient_accumulation
    for conversations in range(whole, training.processes, -1):
        rows = short_rows(tokens, STEPS * conversations)
        if conversations % training.processes == 0 and int(tokens[rows].clip(max=row_limit()).sum()) <= budget:
            return Steps(conversations, rows)
    return Steps(training.processes, short_rows(tokens, STEPS * training.processes))


def short_rows(tokens: np.ndarray, count: int) -> list[int]:
    """Choose `count` rows (or all) among the shortest twentieth, or the shortest `count`, at even distances."""
    shortest = np.argsort(tokens, kind="stable")[: max(count, len(tokens) // 20)]
    places = np.linspace(0, len(shortest) - 1, min(count, len(shortest))).astype(int)
    return [int(row) for row in shortest[np.unique(places)]]


def row_limit() -> int:
    return _ROW_CPU if on_cpu() else _ROW_GPU


def step_recipe(recipe: Recipe, folder: Path, steps: Steps, **training: Any) -> Recipe:
    """The recipe for a scratch run of STEPS steps: the recipe's own but for length, batch and where it is written.

    All steps change the weights: there is no warm-up. What belongs to a long run alone is left out, and what belongs
    to another strategy.
    """
    own = recipe.training
    changed = {
        "batch_size": steps.conversations // own.processes, "gradient_accumulation": 1, "max_steps": STEPS,
        "save_every": RESUME_AT, "log_every": 1, "warmup_ratio": 0.0, "report_to": [],
        "keep_checkpoints": None, "eval_every": None, "early_stopping": None, **training,
    }  # fmt: skip
    if changed.get("strategy") == "vanilla":
        changed["offload"] = None
    if choose_precision(own.precision) != "fp32" and "learning_rate" not in training:
        changed["learning_rate"] = min(own.learning_rate, _MOST_IN_HALF_PRECISION)
    return replace(recipe, output=str(folder), training=replace(own, **changed))


def make_scratch_run(recipe: Recipe, train_split: Any, rows: list[int]) -> None:
    """Make the run folder of a scratch recipe with some rows of the train split; long rows are cut around an answer."""
    import datasets

    with open_run(recipe) as run:
        chosen = train_split.select_columns(["input_ids", "labels", "id"]).select(rows)
        cut = [_shortened(row, row_limit()) for row in chosen]
        bars = datasets.utils.logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            datasets.Dataset.from_list(cut, features=chosen.features).save_to_disk(str(run.dataset / "train"))
        finally:
            if bars:
                datasets.enable_progress_bars()


def _shortened(row: dict[str, Any], limit: int) -> dict[str, Any]:
    if len(row["input_ids"]) <= limit:
        return row
    learned = int(np.flatnonzero(np.asarray(row["labels"][1:]) >= 0)[0]) + 1
    start = max(0, learned - limit // 2)
    return {**row, **{name: row[name][start : start + limit] for name in ("input_ids", "labels")}}


def run_steps_in_child(recipe: Recipe) -> None:
    """Take the steps of a scratch run in processes of their own, as `train` would start them.

    Raises:
        UserError: the one that a process raised.
        RuntimeError: a process failed otherwise.
        StoppedError: it was asked to stop.
    """
    training = recipe.training
    alone = training.processes == 1 and training.strategy not in ZERO_STAGES
    arguments = [recipe.output, *trust_arguments(recipe)]
    if launch_single(_WORKER, arguments) if alone else launch(_WORKER, arguments, training.processes):
        raise StoppedError("stopped as asked")


def resumed_run(run: RunFolder) -> RunFolder:
    return RunFolder(run.root.with_name(f"{run.root.name}-resumed"))


# --- in the processes -------------------------------------------------------------------------------------


def take_steps_twice(root: Path, trust_remote_code: bool = False) -> None:
    """Take the steps of a scratch run, then those after its checkpoint RESUME_AT again, beside it."""
    import torch

    set_deepspeed_environment(on_cpu())
    # DeepSpeed prints what it built, and stdout may be JSON.
    with _quiet_consoles(), quiet_libraries(), contextlib.redirect_stdout(io.StringIO()):
        _take_steps_twice(root, trust_remote_code)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _take_steps_twice(root: Path, trust_remote_code: bool) -> None:
    run, recipe = RunFolder(root), load_run(root, trust_remote_code=trust_remote_code)
    again = resumed_run(run)
    trainer = make_trainer(recipe, run)
    switch_off_dropout(trainer.model)
    trainer.add_callback(_KeepCheckpoint(run, again))
    take_steps(trainer, run)
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    kept = again.checkpoints / f"checkpoint-{RESUME_AT}"
    if kept.exists():  # else it was asked to stop before
        trainer = make_trainer(recipe, again, kept)
        switch_off_dropout(trainer.model)
        take_steps(trainer, again, kept)


class _KeepCheckpoint(TrainerCallback):
    """Keep a checkpoint with its optimizer state, which the next one drops, by links to its files."""

    def __init__(self, run: RunFolder, again: RunFolder) -> None:
        self.run = run
        self.again = again

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or state.global_step != RESUME_AT:
            return
        shutil.copytree(self.run.dataset, self.again.dataset)
        name = f"checkpoint-{RESUME_AT}"
        shutil.copytree(self.run.checkpoints / name, self.again.checkpoints / name, copy_function=os.link)


def switch_off_dropout(model: Any) -> None:
    """Make the steps of a model comparable: dropout draws differently for every split of a batch."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def _quiet_consoles() -> Iterator[None]:
    before = console.quiet, error_console.quiet
    console.quiet = error_console.quiet = True
    try:
        yield
    finally:
        console.quiet, error_console.quiet = before


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep what libraries say while they train and save out of the table."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what DeepSpeed calls in torch
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def main() -> None:
    from minisft.training.distributed import run_worker

    def work() -> None:
        from minisft.run_folder import TRUST_OPTION

        take_steps_twice(Path(sys.argv[1]), TRUST_OPTION in sys.argv[2:])

    run_worker(work)


if __name__ == "__main__":
    main()
