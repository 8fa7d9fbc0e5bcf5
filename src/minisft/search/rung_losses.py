"""The held-out loss of every row at a rung, and the step of a rung."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.recipe import TrainingRecipe
from minisft.search.budget import RUNGS
from minisft.search.statistics import RowLosses

if TYPE_CHECKING:
    from minisft.recipe import Recipe
    from minisft.training.batching import Sizes


def rung_steps(sizes: "Sizes", recipe: "Recipe") -> list[int]:
    """Return the step of each rung: the first step at which a trial has seen that fraction of its supervised tokens.

    Args:
        sizes: Tokens of the train rows.
        recipe: The recipe of the trial.
    """
    from minisft.training.batching import steps_of_epoch

    training = recipe.training
    counts: list[int] = []
    last = None
    epoch = 0
    while last is None or len(counts) < last:
        steps = steps_of_epoch(
            sizes.tokens,
            global_batch=training.global_batch,
            pack_tokens=recipe.data.max_length if training.packing else None,
            seed=recipe.seed,
            epoch=epoch,
        )
        last = last or _last_step(training, len(steps))
        counts += [int(sizes.supervised[step].sum()) for step in steps]
        epoch += 1
    seen = np.cumsum(counts[:last])
    return [int(np.searchsorted(seen, fraction * seen[-1])) + 1 for fraction in RUNGS]


def _last_step(training: TrainingRecipe, steps_of_epoch: int) -> int:
    return training.max_steps or math.ceil(training.epochs * steps_of_epoch)


def compute_row_losses(model: Path, rows: Any, *, precision: str, trust_remote_code: bool, base: Path) -> np.ndarray:
    """Return the summed loss of the supervised tokens of each row, and their number: float64 (2, rows).

    Rows without a supervised token are left out: they have no loss.

    Args:
        model: Folder of a model, a checkpoint or adapters.
        rows: A split with the columns input_ids and labels.
        precision: The recipe's `training.precision`.
        trust_remote_code: Consent to code that comes with the model.
        base: Folder of the base model, for adapters.
    """
    from minisft.evaluation.backends import TransformersModel
    from minisft.evaluation.generation import inference_dtype

    loaded = TransformersModel(model, inference_dtype(precision), trust_remote_code, base)
    try:
        found = [
            loaded.sum_of_losses([(ids, labels)]) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
        ]
    finally:
        loaded.release()
    return np.array([pair for pair in found if pair[1] > 0], dtype=np.float64).reshape(-1, 2).T


def write_losses(path: Path, losses: np.ndarray, seconds: float) -> None:
    """Write what `compute_row_losses` returns, complete or not at all, with the seconds that it took."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, losses=losses, seconds=np.array(seconds))
    temporary.replace(path)


def read_losses(path: Path, trial: int) -> RowLosses:
    """Read the losses of a trial at a rung."""
    with np.load(path) as content:
        sums, tokens = content["losses"]
    return RowLosses(trial, sums, tokens.astype(np.int64))


def read_seconds(paths: Sequence[Path]) -> float:
    """Return the seconds that computing some losses took."""
    total = 0.0
    for path in paths:
        with np.load(path) as content:
            total += float(content["seconds"])
    return total
