"""What fits the machine: the form of the training, its predicted cost, and the checkpoints that the disk holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisft.new_recipe.data_survey import TokenSurvey
from minisft.planning.machines import machine_named, require_count
from minisft.planning.planner import choose, gigabytes, job_of, needed_bytes, predict_recipe
from minisft.planning.prediction import Job, Prediction
from minisft.recipe import STRATEGIES, LoraRecipe, Recipe
from minisft.training.batching import Sizes
from minisft.training.checkpoints import size_text
from minisft.training.disk import checkpoint_size, free_space, most_added

# Decoding reaches about half the rate of a training step's products on a CPU (docs/init.md). On a GPU, a step of
# `transformers` decoding takes at least 30 ms, however small the model is.
_DECODING_SHARE, _GPU_STEP_SECONDS = 0.5, 0.03
_EVALUATION_BATCH = 64
_DISK_SHARE = 0.8  # of the free space that a run may take before fewer checkpoints are kept


@dataclass(frozen=True)
class FittedRun:
    """A recipe in the simplest form that fits the machine.

    Args:
        recipe: The recipe, with its strategy, adapters and gradient checkpointing.
        job: Model, machine and work.
        prediction: Memory and time; its `fits` is False where nothing fits.
        reason: Why this form, in one sentence.
    """

    recipe: Recipe
    job: Job
    prediction: Prediction
    reason: str

    @property
    def parameters(self) -> int:
        return self.job.cost("vanilla", None).parameters

    @property
    def training_seconds(self) -> float:
        return self.prediction.total_seconds or 0.0


def fit_to_machine(draft: Recipe, sizes: Sizes, gpu: str | None) -> FittedRun:
    """Choose full fine-tuning where it fits, else gradient checkpointing, LoRA, or both; and the strategy, as `plan`.

    Args:
        draft: The recipe with its data, batch and processes.
        sizes: Lengths of its training rows.
        gpu: Name of the machine; None is this one.

    Raises:
        UserError: The machine cannot have so many processes, or the configuration of the model cannot be used.
    """
    processes = draft.training.processes
    machine = machine_named(gpu, processes)
    require_count(machine, processes, 1)
    job = job_of(draft, machine, sizes=sizes)
    strategies = STRATEGIES if processes > 1 else ("vanilla",)
    reasons: list[str] = []
    fitted, least = draft, predict_recipe(draft, job, strategies[0])
    for lora, checkpointing in ((None, False), (None, True), (LoraRecipe(), False), (LoraRecipe(), True)):
        tried = replace(draft.training, lora=lora, gradient_checkpointing=checkpointing)
        fitted = replace(draft, training=tried)
        predictions = [predict_recipe(fitted, job, strategy) for strategy in strategies]
        chosen, reason = choose(predictions)
        name = ("LoRA" if lora else "full fine-tuning") + (", gradient checkpointing" if checkpointing else "")
        if chosen is not None:
            why = "; ".join([f"{name} with {reason}", *reasons])
            return FittedRun(_with_strategy(fitted, chosen.setting.strategy), job, chosen, why)
        least = min(predictions, key=needed_bytes)
        reasons.append(f"{name} would need {gigabytes(needed_bytes(least))}")
    why = f"nothing fits {gigabytes(least.usable_bytes)}: {'; '.join(reasons)}"
    return FittedRun(_with_strategy(fitted, least.setting.strategy), job, least, why)


def _with_strategy(recipe: Recipe, strategy: Any) -> Recipe:
    return replace(recipe, training=replace(recipe.training, strategy=strategy))


def processes_of_machine(gpu: str | None, count: int | None) -> int:
    """Return the number of training processes: as asked for, else one for each GPU of this machine, else one."""
    if count is not None:
        return count
    return max(1, torch.cuda.device_count()) if gpu is None else 1


def answer_seconds(job: Job, tokens: TokenSurvey, new_tokens: int) -> float:
    """Predict the seconds of generating an answer in a batch, over all processes."""
    cost, machine = job.cost("vanilla", None), job.machine
    prompt = float(np.mean(tokens.ends - tokens.answers))
    per_token = cost.forward_flops + 2.0 * cost.hidden_size * cost.vocabulary
    rate = machine.flops[job.precision] * machine.utilisation * _DECODING_SHARE
    seconds = (prompt * cost.forward_flops + new_tokens * per_token) / rate
    if machine.kind == "gpu":
        step = max(_GPU_STEP_SECONDS, 2.0 * cost.parameters / machine.bandwidth)
        seconds = max(seconds, new_tokens * step / _EVALUATION_BATCH)
    return seconds / (job.processes if machine.kind == "gpu" else 1)


def choose_disk(
    recipe: Recipe,
    model_folder: Path,
    checkpoints: int,
    *,
    here: bool,
    free_space: Callable[[Path], int] = free_space,
) -> tuple[str, int | None]:
    """Return how much disk the run needs, as text, and how many checkpoints to keep; None: all.

    Args:
        recipe: The recipe.
        model_folder: Folder of the base model.
        checkpoints: Number of checkpoints that the run writes.
        here: Whether the run is for this machine; of another one, the free space is unknown.
        free_space: Returns the number of free bytes on the disk of a folder.
    """
    size = checkpoint_size(recipe, model_folder)
    needed = most_added([], checkpoints, size, recipe.training)
    if not here:
        return f"{size_text(needed)} of disk", None
    output = Path(recipe.output).absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    free = free_space(there)
    if needed <= _DISK_SHARE * free or checkpoints < 2:
        return f"{size_text(needed)} of disk, {size_text(free)} free", None
    fewer = most_added([], checkpoints, size, replace(recipe.training, keep_checkpoints=1))
    return f"{size_text(fewer)} of disk, {size_text(free)} free", 1
