"""The learning rate's schedules, which are transformers', and what `training.scheduler_args` may say of them."""

import inspect
import math
from typing import Any

from minisft.errors import UserError
from minisft.recipe import TrainingRecipe

# Those of transformers that need no metric.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
    "warmup_stable_decay", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
# By the Trainer; the number of stable steps follows from the others.
_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch")
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")  # transformers passes them none
_SHARES = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")
_RATES = ("min_lr", "lr_end")
_COUNTS = ("num_decay_steps", "timescale")
_TRIED = 1000  # steps
_WHERE = "training.scheduler_args"


def require_schedule(training: TrainingRecipe) -> None:
    """Make sure that the schedule of a recipe can be made, before anything is read.

    Raises:
        UserError: there is no such schedule, or its arguments are unknown, missing or impossible.
    """
    name, given = training.scheduler, training.scheduler_args
    if name not in SCHEDULERS:
        what = f"there is no scheduler {name!r} here"
        raise UserError("training.scheduler", what, f"use one of {', '.join(SCHEDULERS)}")
    known, needed = _arguments(name)
    unknown = [key for key in given if key not in known]
    if unknown:
        valid = f"valid names: {', '.join(known)}" if known else "leave it out: this schedule has no arguments"
        raise UserError(f"{_WHERE}.{unknown[0]}", f"the schedule {name} has no argument of that name", valid)
    missing = [key for key in needed if key not in given]
    if missing:
        what = f"the schedule {name} needs {missing[0]}"
        raise UserError(_WHERE, what, f"give it, as in training.scheduler_args={{{missing[0]}: 100}}")
    for key, value in given.items():
        _check_value(key, value, training.learning_rate)
    problem = _problem(training, max(_TRIED, *(2 * int(given.get(key, 0)) for key in _COUNTS)))
    if problem is not None:
        raise UserError(_WHERE, f"the schedule {name} refuses this: {problem}", f"its arguments: {', '.join(known)}")


def require_steps(training: TrainingRecipe, steps: int) -> None:
    """Make sure that a schedule of three stages fits into a run of so many steps.

    Raises:
        UserError: its decay, with the warm-up, is longer than the run.
    """
    decay = training.scheduler_args.get("num_decay_steps")
    if training.scheduler != "warmup_stable_decay" or not isinstance(decay, int):
        return
    warmup = math.ceil(training.warmup_ratio * steps)
    if warmup + decay > steps:
        what = f"{warmup} steps of warm-up and {decay} of decay do not fit into the {steps} steps of this run"
        raise UserError(f"{_WHERE}.num_decay_steps", what, f"give at most {max(steps - warmup, 1)}")


def _arguments(name: str) -> tuple[list[str], list[str]]:
    """Return the names of a schedule's own arguments, and those of them that it needs."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    if name in _WITHOUT_ARGUMENTS:
        return [], []
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    parameters = inspect.signature(schedule).parameters
    own = {key: one for key, one in parameters.items() if key not in _GIVEN}
    return list(own), [key for key, one in own.items() if one.default is inspect.Parameter.empty]


def _check_value(key: str, value: Any, learning_rate: float) -> None:
    where = f"{_WHERE}.{key}"
    if key in (*_SHARES, *_RATES, "num_cycles", "power") and not isinstance(value, (int, float)):
        raise UserError(where, f"must be a number, and is {value!r}", "give a number")
    if key in _SHARES and not 0 <= value <= 1:
        raise UserError(where, f"must be from 0 to 1, and is {value}", "it is a share of training.learning_rate")
    if key in _RATES and not 0 <= value <= learning_rate:
        what = f"must be from 0 to training.learning_rate, which is {learning_rate}, and is {value}"
        raise UserError(where, what, "give the rate at which the schedule ends")
    if key in _COUNTS and not (isinstance(value, int) and value >= 1):
        raise UserError(where, f"must be a whole number of steps, at least 1, and is {value!r}", "give one")


def _problem(training: TrainingRecipe, steps: int) -> str | None:
    """Make the schedule for a run of so many steps and take a few of them; say what it raised."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    try:
        schedule = get_scheduler(
            training.scheduler, optimizer, num_warmup_steps=math.ceil(training.warmup_ratio * steps),
            num_training_steps=steps, scheduler_specific_kwargs=dict(training.scheduler_args),
        )  # fmt: skip
        for step in (0, steps // 2, steps):
            rates = [rate(step) * training.learning_rate for rate in schedule.lr_lambdas]
            if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
                return f"the learning rate at step {step} of {steps} would be {rates[0]}"
    except (TypeError, ValueError, ArithmeticError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None
