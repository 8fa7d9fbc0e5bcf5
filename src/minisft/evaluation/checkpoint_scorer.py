"""The score of a checkpoint while its run still trains, for early stopping: what `evaluate` would give it."""

import contextlib
import tempfile
from pathlib import Path

import torch

from minisft.errors import UserError
from minisft.evaluation.run_evaluation import best_by, open_evaluator, score_model
from minisft.files import hold_lock
from minisft.recipe import Recipe


class CheckpointScorer:
    """Scores checkpoints by `evaluation.best_by`, from their files, as `evaluate` does.

    The answers go into the result cache of the run, so `evaluate` does not generate them again.

    Args:
        recipe: The run's recipe.
        output: The run folder, with prepared data.

    Raises:
        UserError: There are no held-out answers to score, or `evaluate` would refuse the recipe.
    """

    def __init__(self, recipe: Recipe, output: Path) -> None:
        self._recipe, self._output = recipe, output
        # Opened once here, so that what cannot work is refused before the first step.
        with open_evaluator(recipe, output) as evaluator:
            self.metric, self.higher_is_better = best_by(recipe.evaluation, evaluator.row_metrics)
            if not evaluator.held_out.first.examples:
                problem = "there are no held-out answers to score"
                fix = "set data.test_fraction above 0, or data.test, and train again"
                raise UserError("training.early_stopping_by", problem, fix)

    def __call__(self, checkpoint: Path) -> float:
        """Return the score of a complete checkpoint; torch's random state is left as it was.

        Raises:
            UserError: The metric failed on the answers.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            folder = self._output / "evaluation"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(hold_lock(folder / ".lock"))
            except BlockingIOError:  # `evaluate --follow` is at work, and two processes must not write one cache
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minisft-")))
            scored, failures = score_model(self._recipe, self._output, checkpoint.name, checkpoint, folder)
        if self.metric not in scored.scores:
            error = failures[self.metric]
            fix = f"{error.fix}; then resume with --resume: {checkpoint.name} is complete, and is scored first"
            raise UserError(error.where, error.problem, fix)
        return scored.scores[self.metric].score
