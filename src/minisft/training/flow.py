"""When a run logs, evaluates, saves and ends: what the Trainer's own flow does not know."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from minisft.training.batching import StepSampler
from minisft.training.held_out import eval_losses, is_due, stops_early

if TYPE_CHECKING:
    from minisft.training.trainer import SupervisedTokenTrainer


class ResumedState(TrainerCallback):
    """Set what the Trainer does not on resume: the sampler's epoch, and the recipe's own log and save steps."""

    def __init__(self, sampler: StepSampler) -> None:
        self.sampler = sampler

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.epoch = state.global_step // len(self.sampler)


class FirstStep(TrainerCallback):
    """Call a function once, when the first step of this process's part of a run is taken."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.call is not None:
            call, self.call = self.call, None
            call()


class HeldOutLoss(TrainerCallback):
    """Compute the held-out loss where it is due, in the log of its step, and end the run when it no longer falls."""

    def __init__(self, trainer: "SupervisedTokenTrainer", every: str | int | None, patience: int | None) -> None:
        self.trainer, self.every, self.patience = trainer, every, patience

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch_steps = len(self.trainer.sampler)
        if is_due(state.global_step, every=self.every, epoch_steps=epoch_steps, last=state.max_steps):
            control.should_evaluate = control.should_log = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if stops_early(eval_losses(state.log_history), self.patience):
            self.trainer.ended_early = True
            control.should_save = control.should_training_stop = True


class StopAtStepEnd(TrainerCallback):
    """Save and end where the processes agreed to stop; the epoch's end, which follows, saves no second time."""

    def __init__(self, trainer: "SupervisedTokenTrainer") -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stops_here:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stops_here or self.trainer.ended_early:
            control.should_save = False
