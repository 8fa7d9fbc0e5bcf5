"""Optimizers, learning-rate schedules and gradient clipping that a recipe can name.

Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2, is Lion. The
packages that offer it need a GPU or are not maintained, and it has few lines.

On a CPU torch sums the squares of a tensor in fp32: the norm of an embedding of 28 million numbers is up to 1e-3 too
small, and so is every clipped gradient. DeepSpeed sums in fp64.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch

from minisft.errors import UserError
from minisft.recipe import TrainingRecipe
from minisft.text import first_line

# Optimizers of MiniSFT; every other name is one of transformers.
_FUSED_ADAMW = "adamw_torch_fused"
_OWN = ("adamw", "lion")
# They step inside the backward, project chosen modules or switch their weights between training and saving: what the
# Trainer does for them in its training step, the training step of MiniSFT does not do.
_NEED_A_STEP_OF_THEIR_OWN = ("lomo", "adalomo", "galore", "apollo", "schedule_free")
# Bytes of state per trained parameter, by a part of the optimizer's name; others are assumed to keep Adam's moments.
_STATES = {"4bit": 1, "8bit": 2, "adafactor": 0, "sgd": 0, "lion": 4, "rmsprop": 4, "adagrad": 4}
_ADAM = 8
LION_BETAS = (0.9, 0.99)


class Lion(torch.optim.Optimizer):
    """Lion: steps of the same size in every coordinate, by the sign of a mix of momentum and gradient; decoupled decay.

    Args:
        params: Parameters or groups of them.
        lr: Size of a step; a third to a tenth of AdamW's.
        betas: Share of the momentum in the mix, and decay rate of the momentum.
        weight_decay: Decay, multiplied by the learning rate as in AdamW; three to ten times AdamW's.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = LION_BETAS, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; `closure`, if given, computes the loss and gradients again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        gradient, (mixed, kept), rate = weight.grad, group["betas"], group["lr"]
        state = self.state[weight]
        if not state:
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        momentum = state["exp_avg"]
        weight.mul_(1 - rate * group["weight_decay"])
        weight.add_(momentum.lerp(gradient, 1 - mixed).sign_(), alpha=-rate)
        momentum.lerp_(gradient, 1 - kept)


def trainer_name(optimizer: str) -> str:
    """Return the name of an optimizer in transformers' TrainingArguments; Lion is passed to the Trainer separately."""
    return _FUSED_ADAMW if optimizer in _OWN else optimizer


def own_optimizer(optimizer: str, learning_rate: float) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Return class and options of an optimizer that transformers does not have, or None if it has it."""
    return (Lion, {"lr": learning_rate}) if optimizer == "lion" else None


def bytes_of_states(optimizer: str) -> int:
    """Return the bytes of optimizer state per trained parameter."""
    return next((size for name, size in _STATES.items() if name in optimizer), _ADAM)


def require_optimizer(optimizer: str) -> None:
    """Check that an optimizer can be made on this machine, and on a CPU that it can take a step.

    Raises:
        UserError: There is none of that name, or it does not work here; the message says why, and what works.
    """
    from transformers.training_args import OptimizerNames

    known = [*_OWN, *(name.value for name in OptimizerNames)]
    if optimizer not in known:
        problem = f"there is no optimizer {optimizer!r} here"
    elif (obstacle := _obstacle(optimizer)) is not None:
        problem = f"{optimizer} cannot be used here: {obstacle}"
    else:
        return
    working = [name for name in known if _obstacle(name) is None]
    raise UserError("training.optimizer", problem, f"use one of those that work here: {', '.join(working)}")


def _obstacle(optimizer: str) -> str | None:
    """Return the reason why an optimizer cannot be used here, or None; it is tried with one parameter."""
    if optimizer in _OWN:
        return None
    if optimizer.startswith(_NEED_A_STEP_OF_THEIR_OWN):
        return "it needs a training step of its own, which MiniSFT does not have"
    from transformers import Trainer
    from transformers.training_args import OptimizerNames, TrainingArguments

    # The arguments from which the Trainer makes an optimizer, with the defaults of TrainingArguments.
    arguments: Any = SimpleNamespace(
        optim=OptimizerNames(optimizer), optim_args=None, optim_target_modules=None, learning_rate=1e-3,
        weight_decay=0.0, warmup_steps=0, adam_beta1=TrainingArguments.adam_beta1,
        adam_beta2=TrainingArguments.adam_beta2, adam_epsilon=TrainingArguments.adam_epsilon,
    )  # fmt: skip
    weight = torch.nn.Parameter(torch.ones(2, 2))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        made = kind([{"params": [weight], "weight_decay": 0.0}], **options)
        if not torch.cuda.is_available():
            weight.grad = torch.ones_like(weight)
            made.step()
    except Exception as error:  # each library refuses in its own way, from ImportError to AssertionError
        return first_line(error)
    return None


# Schedules of transformers that need no metric.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
    "warmup_stable_decay", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
# Set by the Trainer; the number of stable steps follows from the others.
_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch")
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")  # transformers passes them none
_SHARES = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")
_RATES = ("min_lr", "lr_end")
_COUNTS = ("num_decay_steps", "timescale")
_TRIED = 1000  # steps
_WHERE = "training.scheduler_args"


def require_schedule(training: TrainingRecipe) -> None:
    """Check that the schedule of a recipe can be made, before anything is read.

    Raises:
        UserError: there is no such schedule, or its arguments are unknown, missing or impossible.
    """
    name, given = training.scheduler, training.scheduler_args
    if name not in SCHEDULERS:
        problem = f"there is no scheduler {name!r} here"
        raise UserError("training.scheduler", problem, f"use one of {', '.join(SCHEDULERS)}")
    known, needed = _arguments(name)
    unknown = [key for key in given if key not in known]
    if unknown:
        valid = f"valid names: {', '.join(known)}" if known else "leave it out: this schedule has no arguments"
        raise UserError(f"{_WHERE}.{unknown[0]}", f"the schedule {name} has no argument of that name", valid)
    missing = [key for key in needed if key not in given]
    if missing:
        problem = f"the schedule {name} needs {missing[0]}"
        raise UserError(_WHERE, problem, f"give it, as in training.scheduler_args={{{missing[0]}: 100}}")
    for key, value in given.items():
        _check_value(key, value, training.learning_rate)
    refusal = _problem(training, max(_TRIED, *(2 * int(given.get(key, 0)) for key in _COUNTS)))
    if refusal is not None:
        raise UserError(_WHERE, f"the schedule {name} refuses this: {refusal}", f"its arguments: {', '.join(known)}")


def require_steps(training: TrainingRecipe, steps: int) -> None:
    """Check that a schedule of three stages fits into a run of `steps` steps.

    Raises:
        UserError: Warm-up and decay together are longer than the run.
    """
    decay = training.scheduler_args.get("num_decay_steps")
    if training.scheduler != "warmup_stable_decay" or not isinstance(decay, int):
        return
    warmup = math.ceil(training.warmup_ratio * steps)
    if warmup + decay > steps:
        problem = f"{warmup} steps of warm-up and {decay} of decay do not fit into the {steps} steps of this run"
        raise UserError(f"{_WHERE}.num_decay_steps", problem, f"give at most {max(steps - warmup, 1)}")


def _arguments(name: str) -> tuple[list[str], list[str]]:
    """Return the names of the arguments of a schedule, and of those that it requires."""
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
        raise UserError(where, f"must be from 0 to 1, and is {value}", "it is a fraction of training.learning_rate")
    if key in _RATES and not 0 <= value <= learning_rate:
        problem = f"must be from 0 to training.learning_rate, which is {learning_rate}, and is {value}"
        raise UserError(where, problem, "give the rate at which the schedule ends")
    if key in _COUNTS and not (isinstance(value, int) and value >= 1):
        raise UserError(where, f"must be a whole number of steps, at least 1, and is {value!r}", "give one")


def _problem(training: TrainingRecipe, steps: int) -> str | None:
    """Make the schedule for a run of `steps` steps and take a few; return the error that it raised, or None."""
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
        return first_line(error)
    return None


def clipping_norm(training: TrainingRecipe) -> float:
    """Return the norm to which gradients are clipped; infinity clips none, and the norm is still logged."""
    return math.inf if training.max_grad_norm is None else training.max_grad_norm


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients of `parameters` so that their norm is at most `max_norm`; return the norm before it, ()."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def gradient_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of all gradients together, () in fp32: rows are summed in fp32, and the rows' norms in fp64."""
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients if gradient.numel()]
    if not rows:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64).float()
