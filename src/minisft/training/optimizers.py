"""The optimizers that a recipe can name: which of them work here, how much they keep, and Lion.

Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2, is Lion. The
packages that offer it need a GPU or are not maintained, and it has few lines.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch

from minisft.errors import UserError

# Names of our own; every other name is one of transformers'.
_FUSED_ADAMW = "adamw_torch_fused"
_OWN = ("adamw", "lion")
# They step inside the backward, project chosen modules or switch their weights between training and saving: what the
# Trainer does for them in its own training step, this project's step does not do.
_NEED_A_STEP_OF_THEIR_OWN = ("lomo", "adalomo", "galore", "apollo", "schedule_free")
# Bytes an optimizer keeps for each trained parameter, by a part of its name; others are taken for Adam's two moments.
_STATES = {"4bit": 1, "8bit": 2, "adafactor": 0, "sgd": 0, "lion": 4, "rmsprop": 4, "adagrad": 4}
_ADAM = 8
LION_BETAS = (0.9, 0.99)


class Lion(torch.optim.Optimizer):
    """Steps of one size in every coordinate: the sign of a mix of momentum and gradient, and decoupled decay.

    Args:
        params: parameters or groups of them.
        lr: the size of a step; a third to a tenth of AdamW's.
        betas: the share of the momentum in the mix, and the share of it that stays.
        weight_decay: as in AdamW, times the learning rate; three to ten times AdamW's.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = LION_BETAS, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; `closure`, where given, computes the loss anew with gradients."""
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
    """Return what transformers' TrainingArguments call an optimizer; Lion is given to the Trainer beside them."""
    return _FUSED_ADAMW if optimizer in _OWN else optimizer


def own_optimizer(optimizer: str, learning_rate: float) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Return class and options of an optimizer that transformers does not have, or None where it has it."""
    return (Lion, {"lr": learning_rate}) if optimizer == "lion" else None


def bytes_of_states(optimizer: str) -> int:
    """Return how many bytes an optimizer keeps for each trained parameter."""
    return next((size for name, size in _STATES.items() if name in optimizer), _ADAM)


def require_optimizer(optimizer: str) -> None:
    """Make sure that an optimizer can be made here, and on a CPU that it can take a step.

    Raises:
        UserError: there is none of that name, or it does not work here; naming why, and those that work.
    """
    known = [*_OWN, *_names_of_transformers()]
    if optimizer not in known:
        what = f"there is no optimizer {optimizer!r} here"
    elif (obstacle := _obstacle(optimizer)) is not None:
        what = f"{optimizer} cannot be used here: {obstacle}"
    else:
        return
    working = [name for name in known if _obstacle(name) is None]
    raise UserError("training.optimizer", what, f"use one of those that work here: {', '.join(working)}")


def _names_of_transformers() -> Iterable[str]:
    from transformers.training_args import OptimizerNames

    return [name.value for name in OptimizerNames]


def _obstacle(optimizer: str) -> str | None:
    """Say why an optimizer cannot be used here, or return None: one parameter is given to it, as the Trainer does."""
    if optimizer in _OWN:
        return None
    if optimizer.startswith(_NEED_A_STEP_OF_THEIR_OWN):
        return "it needs a training step of its own, which MiniSFT does not have"
    from transformers import Trainer

    weight = torch.nn.Parameter(torch.ones(2, 2))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(_arguments_of(optimizer))
        made = kind([{"params": [weight], "weight_decay": 0.0}], **options)
        if not torch.cuda.is_available():
            weight.grad = torch.ones_like(weight)
            made.step()
    except Exception as error:  # each library refuses in its own way, from ImportError to AssertionError
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def _arguments_of(optimizer: str) -> Any:
    """Return what the Trainer reads of its arguments to make an optimizer, at TrainingArguments' defaults."""
    from transformers.training_args import OptimizerNames, TrainingArguments

    return SimpleNamespace(
        optim=OptimizerNames(optimizer), optim_args=None, optim_target_modules=None, learning_rate=1e-3,
        weight_decay=0.0, warmup_steps=0, adam_beta1=TrainingArguments.adam_beta1,
        adam_beta2=TrainingArguments.adam_beta2, adam_epsilon=TrainingArguments.adam_epsilon,
    )  # fmt: skip
