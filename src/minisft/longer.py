"""Going on with a run beyond the end that it had: with more epochs or steps, where that changes no step before it."""

from collections.abc import Iterable

from minisft.errors import UserError
from minisft.recipe import TrainingRecipe

_KEYS = {"training.epochs", "training.max_steps"}
# Their learning rate does not depend on the number of all steps; the warm-up, a share of it, does.
_FREE, _FREE_BUT_FOR_WARM_UP = ("constant",), ("constant_with_warmup", "inverse_sqrt")


def is_only_longer(changed: Iterable[str], earlier: TrainingRecipe, now: TrainingRecipe) -> bool:
    """Say whether two recipes of a run, whose keys `changed` differ, differ in a larger number of epochs or steps."""
    if not changed or not set(changed) <= _KEYS:
        return False
    if earlier.max_steps is None or now.max_steps is None:
        return earlier.max_steps == now.max_steps and now.epochs > earlier.epochs
    return now.max_steps > earlier.max_steps


def refuse_other_trajectory(training: TrainingRecipe) -> None:
    """Refuse to make a run longer whose steps so far would not be those of the longer run.

    Raises:
        UserError: naming the key that makes them depend on the end, and how to go on.
    """
    if training.early_stopping is not None:
        what = "early stopping decides where this run ends, and has looked at the loss at its end"
        raise UserError("training.early_stopping", what, "train anew with --force, or into another `output`")
    if training.scheduler not in (*_FREE, *_FREE_BUT_FOR_WARM_UP):
        raise UserError(
            "training.scheduler",
            f"the learning rate of {training.scheduler} reaches its end with the last step, so the steps of a longer "
            "run would have been others from the beginning; --resume makes a run longer with a constant rate alone",
            "train anew with --force and the larger number, or begin another run with this one's model/ as its `model`",
        )
    if training.scheduler in _FREE_BUT_FOR_WARM_UP and training.warmup_ratio > 0:
        raise UserError(
            "training.warmup_ratio",
            f"the warm-up is a share of all steps, {training.warmup_ratio}, so that of a longer run is longer",
            "train anew with --force and the larger number; with warmup_ratio 0 a run can be made longer later",
        )
