"""A few real steps of the recipe in a scratch folder, in separate processes.

The steps are taken twice: all of them, and again those after the checkpoint of step RESUME_AT, resumed from it.
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
# Largest number of tokens of all steps together, and of one row: small steps show the same as large ones.
_TOKENS_CPU, _TOKENS_GPU = 2400, 30000
_ROW_CPU, _ROW_GPU = 512, 2048
# Largest learning rate in half precision. AdamW's first steps are as long for a tiny gradient, which is only rounding
# there, as for a large one: two correct computations differ by 6 % in the loss of the third step at 2e-4, and by 0.2 %
# at 2e-5.
_MAX_HALF_LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class Steps:
    """The steps to take.

    Args:
        conversations: Number of conversations of a step.
        rows: Indexes of the train split's rows that all steps take together.
    """

    conversations: int
    rows: list[int]


def choose_steps(training: TrainingRecipe, train_split: Any) -> Steps:
    """Choose short rows of different lengths, and as many for a step as the recipe has, within a budget of tokens."""
    tokens = measure_lengths(train_split).tokens
    budget = _TOKENS_CPU if on_cpu() else _TOKENS_GPU
    global_batch = training.global_batch
    for conversations in range(global_batch, training.processes, -1):
        rows = short_rows(tokens, STEPS * conversations)
        if conversations % training.processes == 0 and int(tokens[rows].clip(max=row_limit()).sum()) <= budget:
            return Steps(conversations, rows)
    return Steps(training.processes, short_rows(tokens, STEPS * training.processes))


def short_rows(tokens: np.ndarray, count: int) -> list[int]:
    """Choose `count` rows at even distances among the shortest twentieth, or the shortest `count`; all if fewer."""
    shortest = np.argsort(tokens, kind="stable")[: max(count, len(tokens) // 20)]
    ranks = np.linspace(0, len(shortest) - 1, min(count, len(shortest))).astype(int)
    return [int(row) for row in shortest[np.unique(ranks)]]


def row_limit() -> int:
    """Return the largest number of tokens of a row."""
    return _ROW_CPU if on_cpu() else _ROW_GPU


def step_recipe(recipe: Recipe, folder: Path, steps: Steps, **training: Any) -> Recipe:
    """Return the recipe for a scratch run of STEPS steps, which differs in length, batch and output folder.

    There is no warm-up, so that all steps change the weights. Options of a long run are switched off, and so are those
    of another strategy.
    """
    own = recipe.training
    changed = {
        "batch_size": steps.conversations // own.replicas, "gradient_accumulation": 1, "max_steps": STEPS,
        "save_every": RESUME_AT, "log_every": 1, "warmup_ratio": 0.0, "report_to": [],
        "keep_checkpoints": None, "eval_every": None, "early_stopping": None,
        "early_stopping_by": "loss", **training,
    }  # fmt: skip
    if changed.get("strategy") == "vanilla":
        changed["offload"] = None
    if choose_precision(own.precision) != "fp32" and "learning_rate" not in training:
        changed["learning_rate"] = min(own.learning_rate, _MAX_HALF_LEARNING_RATE)
    return replace(recipe, output=str(folder), training=replace(own, **changed))


def make_scratch_run(recipe: Recipe, train_split: Any, rows: list[int]) -> None:
    """Make the run folder of a scratch recipe with some rows of the train split; long rows are cut around an answer."""
    import datasets

    with open_run(recipe) as run:
        chosen = train_split.select_columns(["input_ids", "labels", "id"]).select(rows)
        cut = [_cut_around_answer(row, row_limit()) for row in chosen]
        bars = datasets.utils.logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            datasets.Dataset.from_list(cut, features=chosen.features).save_to_disk(str(run.dataset / "train"))
        finally:
            if bars:
                datasets.enable_progress_bars()


def _cut_around_answer(row: dict[str, Any], limit: int) -> dict[str, Any]:
    """Return a row with at most `limit` tokens, among them its first learned token."""
    if len(row["input_ids"]) <= limit:
        return row
    learned = int(np.flatnonzero(np.asarray(row["labels"][1:]) >= 0)[0]) + 1
    start = max(0, learned - limit // 2)
    return {**row, **{name: row[name][start : start + limit] for name in ("input_ids", "labels")}}


def run_steps_in_child(recipe: Recipe) -> None:
    """Take the steps of a scratch run in separate processes, as `train` would start them.

    Raises:
        UserError: A process raised it.
        RuntimeError: A process failed for another reason.
        StoppedError: The steps were asked to stop.
    """
    training = recipe.training
    single = training.processes == 1 and training.strategy not in ZERO_STAGES
    arguments = [recipe.output, *trust_arguments(recipe)]
    if launch_single(_WORKER, arguments) if single else launch(_WORKER, arguments, training.processes):
        raise StoppedError("stopped as asked")


def resumed_run(run: RunFolder) -> RunFolder:
    """Return the folder, beside a scratch run, of the steps that are resumed from its checkpoint."""
    return RunFolder(run.root.with_name(f"{run.root.name}-resumed"))


# --- in the processes -------------------------------------------------------------------------------------


def take_steps_twice(root: Path, trust_remote_code: bool = False) -> None:
    """Take the steps of a scratch run, then those after its checkpoint RESUME_AT again, in the folder beside it."""
    import torch

    set_deepspeed_environment(on_cpu())
    # DeepSpeed prints the extensions that it built, and stdout may have to be JSON.
    with quiet_consoles(), quiet_libraries(), contextlib.redirect_stdout(io.StringIO()):
        # 1. All steps; the checkpoint of RESUME_AT is kept.
        run, recipe = RunFolder(root), load_run(root, trust_remote_code=trust_remote_code)
        resumed = resumed_run(run)
        trainer = make_trainer(recipe, run)
        switch_off_dropout(trainer.model)
        trainer.add_callback(_KeepCheckpoint(run, resumed))
        take_steps(trainer, run)
        # 2. Free the model.
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        # 3. The steps after the checkpoint, which is missing where the steps were asked to stop before it.
        checkpoint = resumed.checkpoints / f"checkpoint-{RESUME_AT}"
        if checkpoint.exists():
            trainer = make_trainer(recipe, resumed, checkpoint)
            switch_off_dropout(trainer.model)
            take_steps(trainer, resumed, checkpoint)
            del trainer
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _KeepCheckpoint(TrainerCallback):
    """Keep a checkpoint with its optimizer state, which the next checkpoint deletes, by hard links to its files."""

    def __init__(self, run: RunFolder, resumed: RunFolder) -> None:
        self.run = run
        self.resumed = resumed

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or state.global_step != RESUME_AT:
            return
        shutil.copytree(self.run.dataset, self.resumed.dataset)
        name = f"checkpoint-{RESUME_AT}"
        shutil.copytree(self.run.checkpoints / name, self.resumed.checkpoints / name, copy_function=os.link)


def switch_off_dropout(model: Any) -> None:
    """Make the steps of a model comparable: dropout draws other random numbers for every split of a batch."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def quiet_consoles() -> Iterator[None]:
    """Keep the notes of a training out of the table of checks, and of the JSON that may take its place."""
    before = console.quiet, error_console.quiet
    console.quiet = error_console.quiet = True
    try:
        yield
    finally:
        console.quiet, error_console.quiet = before


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the messages that libraries print while they train and save out of the table of checks."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls deprecated functions of torch
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
