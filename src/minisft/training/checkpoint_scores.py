"""Early stopping by a score: each checkpoint is scored when it is complete, and the run ends when none is better.

`evaluation` does the scoring. Training may not import it, so the caller passes it in as a `Scorer`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from minisft.console import say
from minisft.recipe import TrainingRecipe
from minisft.training.checkpoints import is_due_for_score, record_score, recorded_score
from minisft.training.held_out import EarlyStopping, is_due
from minisft.training.zero import load_unsharded

if TYPE_CHECKING:
    from minisft.training.trainer import SupervisedTokenTrainer


class Scorer(Protocol):
    """Scores checkpoints by one metric."""

    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    def __call__(self, checkpoint: Path) -> float:
        """Return the score of a complete checkpoint; the random state is left as it was."""


def early_stopping_of(training: TrainingRecipe, scorer: Scorer | None) -> EarlyStopping | None:
    """Return what ends a run early, if the recipe asks for that: the held-out loss, or the metric of the scorer."""
    if training.early_stopping is None:
        return None
    if scorer is None:
        return EarlyStopping(training.early_stopping)
    return EarlyStopping(training.early_stopping, f"eval_{scorer.metric}", scorer.higher_is_better)


class CheckpointScores(TrainerCallback):
    """Score every checkpoint that is due, and end the run when the best score is too old.

    The first process scores, and the others wait for it. The score is written into the checkpoint, so that a resumed
    run makes the same decision.

    Args:
        trainer: The trainer.
        scorer: Scores a checkpoint.
        early_stopping: When the run ends.
        training: The recipe's `training`.
    """

    def __init__(
        self,
        trainer: "SupervisedTokenTrainer",
        scorer: Scorer,
        early_stopping: EarlyStopping,
        training: TrainingRecipe,
    ) -> None:
        self.trainer, self.scorer, self.early_stopping, self.training = trainer, scorer, early_stopping, training

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stops_here:  # whoever asked for that may not wait for answers; resuming scores it
            return
        every, epoch_steps = self.training.save_every, len(self.trainer.sampler)
        if not is_due(state.global_step, every=every, epoch_steps=epoch_steps, last=state.max_steps):
            return
        self._score(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self.early_stopping.ends(state.log_history):
            self.trainer.ended_early = control.should_training_stop = True

    def ends_with(self, checkpoint: Path) -> bool:
        """Score the checkpoint to resume from, if that was not done; return whether the run ends with it."""
        self.trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        is_scored = recorded_score(checkpoint, self.early_stopping.key) is not None
        if not is_scored and is_due_for_score(checkpoint, self.training):
            self._score(checkpoint)
        self.trainer.ended_early = self.early_stopping.ends(self.trainer.state.log_history)
        return self.trainer.ended_early

    def _score(self, checkpoint: Path) -> None:
        """Score a checkpoint in the first process, log the score in all, and write it into the checkpoint."""
        trainer = self.trainer
        scores: list[float | None] = [None]
        if trainer.is_world_process_zero():
            with load_unsharded(getattr(trainer.args, "hf_deepspeed_config", None)):
                scores = [self.scorer(checkpoint)]
        [score] = broadcast_object_list(scores)
        trainer.log({self.early_stopping.key: score})
        if trainer.is_world_process_zero():
            say(f"{checkpoint.name}: {self.scorer.metric} {score:.4g} on the held-out conversations")
            record_score(checkpoint, trainer.state.log_history[-1])
        trainer.accelerator.wait_for_everyone()
