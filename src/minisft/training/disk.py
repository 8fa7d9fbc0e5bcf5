"""The disk space that a run will take, computed before it starts.

Counted are the parts that grow with the model: the weights of every checkpoint and of `model/`, and the state
that resuming needs (Rajbhandari et al. 2020, section 3.1: AdamW keeps two numbers for each parameter, and ZeRO a third,
the fp32 weight). The rest is assumed to be as large as the tokenizer and configuration of the base model.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minisft.console import say
from minisft.errors import UserError
from minisft.models import build_on_meta_device, load_config
from minisft.recipe import LoraRecipe, Recipe, TrainingRecipe
from minisft.run_folder import RunFolder, step_of
from minisft.training.batching import measure_lengths, steps_of_epoch
from minisft.training.checkpoints import has_state, size_text
from minisft.training.device import choose_precision
from minisft.training.optimization import bytes_of_states, require_steps

_FP32 = 4
_HALF = 2
# Random states, headers, the log of the steps, and files that DeepSpeed adds for its tools.
_SMALL_FILES = 150_000
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class CheckpointSize:
    """Size of a checkpoint in bytes: its model, and the state that resuming needs."""

    model: int
    state: int


def free_space(folder: Path) -> int:
    """Return the number of free bytes on the disk of a folder."""
    return shutil.disk_usage(folder).free


def require_disk(
    recipe: Recipe,
    run: RunFolder,
    model_folder: Path,
    resume_from: Path | None,
    *,
    freed_bytes: int = 0,
    place: Path | None = None,
    free_space: Callable[[Path], int] = free_space,
) -> None:
    """Check that there is disk space for the checkpoints that a run will write.

    Args:
        recipe: Recipe to train; its data is prepared.
        run: Run folder, which must exist.
        model_folder: Folder of the base model.
        resume_from: Checkpoint to resume from.
        freed_bytes: Bytes that deleting an earlier run frees before the first checkpoint is written.
        place: Final path of the run, if it is not the folder of `run`; it may not exist yet.
        free_space: Returns the number of free bytes on the disk of a folder.

    Raises:
        UserError: There is too little; the message says how much is needed and how much is free.
    """
    size = checkpoint_size(recipe, model_folder)
    begun_at = step_of(resume_from) if resume_from else 0
    steps = StepsOfRun.of(recipe.training, run, recipe.data.max_length, recipe.seed)
    require_steps(recipe.training, steps.last)
    count = steps.checkpoints_after(begun_at, recipe.training)
    states = [has_state(path) for path in run.list_checkpoints()]
    needed = most_added(states, count, size, recipe.training)
    place = place or run.root
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    free = free_space(there) + freed_bytes
    model, state = size_text(size.model), size_text(size.state)
    checkpoints = "1 checkpoint" if count == 1 else f"{count} checkpoints"
    problem = f"{size_text(needed)} for {checkpoints} of {model}, {state} of state for resuming"
    if needed > free:
        raise UserError(
            place,
            f"the run needs {problem} and model/, and {size_text(free)} are free there",
            "free some space, name an `output` on another disk, or keep less (training.keep_checkpoints, save_every)",
        )
    say(f"disk {problem}; {size_text(free)} free")


def checkpoint_size(recipe: Recipe, model_folder: Path) -> CheckpointSize:
    """Return the size of one checkpoint, from the parameters of the model and the layout of the strategy.

    Vanilla stores fp32 weights and the moments. DeepSpeed casts the module to the format of the arithmetic; its state
    holds the moments and an fp32 weight for each trained parameter, and under stages 1 and 2 a copy of the module.
    """
    training = recipe.training
    every, trained = count_parameters(model_folder, training.lora, recipe.trust_remote_code)
    saved = trained if training.lora else every
    moments = bytes_of_states(training.optimizer)
    small = sum(path.stat().st_size for pattern in _TOKENIZER_FILES for path in model_folder.glob(pattern))
    if training.strategy == "vanilla":
        return CheckpointSize(saved * _FP32 + small, trained * moments + _SMALL_FILES)
    weight = _FP32 if choose_precision(training.precision) == "fp32" else _HALF
    module = 0 if training.strategy == "zero3" else saved * weight
    return CheckpointSize(saved * weight + small, trained * (_FP32 + moments) + module + _SMALL_FILES)


def count_parameters(folder: Path, lora: LoraRecipe | None, trust_remote_code: bool = False) -> tuple[int, int]:
    """Return the number of parameters of a model folder, and of those that are trained; tied ones count once."""
    import torch

    from minisft.training.lora import add_lora

    config = load_config(folder, trust_remote_code)
    with torch.device("meta"):  # allocates no memory
        model = build_on_meta_device(config, trust_remote_code)
        if lora is not None:
            model = add_lora(model, lora, base_name=str(folder), seed=0)
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def checkpoints_to_write(training: TrainingRecipe, run: RunFolder, begun_at: int, max_length: int, seed: int) -> int:
    """Return the number of checkpoints after the step `begun_at`."""
    return StepsOfRun.of(training, run, max_length, seed).checkpoints_after(begun_at, training)


@dataclass(frozen=True)
class StepsOfRun:
    """The number of steps of an epoch, and of the run."""

    an_epoch: int
    last: int

    @classmethod
    def of(cls, training: TrainingRecipe, run: RunFolder, max_length: int, seed: int) -> "StepsOfRun":
        """Count the steps of a run whose data is prepared."""
        from minisft.data.prepared import load_split

        epoch = steps_of_epoch(
            measure_lengths(load_split(run.root, "train")).tokens,
            global_batch=training.global_batch,
            pack_tokens=max_length if training.packing else None,
            seed=seed,
            epoch=0,
        )
        return cls(len(epoch), training.max_steps or math.ceil(training.epochs * len(epoch)))

    def checkpoints_after(self, begun_at: int, training: TrainingRecipe) -> int:
        every = self.an_epoch if training.save_every == "epoch" else training.save_every
        return self.last // every - begun_at // every + (self.last % every != 0)


def most_added(states: list[bool], count: int, size: CheckpointSize, training: TrainingRecipe) -> int:
    """Return the maximum growth of a run folder in bytes while `count` checkpoints and `model/` are written.

    A new checkpoint is complete before an older one is removed.

    Args:
        states: For each existing checkpoint, in the order of steps, whether it holds its state.
        count: Number of checkpoints to come.
        size: Size of one checkpoint.
        training: Settings that say which checkpoints are kept.
    """

    def added(written: int, more: int) -> int:
        """Return the growth in bytes once `written` checkpoints are pruned and `more` complete ones exist."""
        models, holding = _kept(states, written, training)
        return (models + more - len(states)) * size.model + (holding + more - sum(states)) * size.state

    # From the first one on, the kept size only grows: the maximum is reached with the first of them, or with the last.
    most = max(added(0, 1), added(count - 1, 1)) if count else 0
    return max(most, added(count, 0) + size.model)


def _kept(states: list[bool], written: int, training: TrainingRecipe) -> tuple[int, int]:
    """Return the number of checkpoints after `written` new ones, and of those that hold their state."""
    if written == 0:
        return len(states), sum(states)
    models = len(states) + written
    if training.keep_checkpoints is not None:
        models = min(models, training.keep_checkpoints + 1)  # and the best
    if training.keep_optimizer == "newest":
        return models, 1
    earlier = max(models - written, 0)
    return models, min(models, written) + sum(states[len(states) - earlier :])
