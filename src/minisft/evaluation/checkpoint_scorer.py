"""The score of a checkpoint while its run still trains, for early stopping: what `evaluate` would give it."""

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from minisft.errors import UserError
from minisft.evaluation.backends import Workers, place_model
from minisft.evaluation.generation import inference_dtype
from minisft.evaluation.row_metrics import load_row_metrics
from minisft.evaluation.run_evaluation import best_by, make_evaluator
from minisft.files import hold_lock
from minisft.metric_names import parse_metrics
from minisft.models import resolve_model
from minisft.recipe import Recipe


class CheckpointScorer:
    """Scores checkpoints by `evaluation.best_by`, with the evaluator of `evaluate`, from their files.

    The answers go into the result cache of the run, so `evaluate` does not generate them again.

    Args:
        recipe: The run's recipe.
        output: The run folder, with prepared data.

    Raises:
        UserError: There are no held-out answers to score, or the metric's function cannot be loaded.
    """

    def __init__(self, recipe: Recipe, output: Path) -> None:
        row_metrics = load_row_metrics(parse_metrics(recipe.evaluation.metrics))
        self.metric, self.higher_is_better = best_by(recipe.evaluation, row_metrics)
        base = resolve_model(recipe.model, recipe.trust_remote_code).folder
        self._placement = place_model(base, inference_dtype(recipe.training.precision), recipe.evaluation)
        self._evaluator = make_evaluator(recipe, output, base, self._workers(), row_metrics)
        if not self._evaluator.held_out.first.examples:
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
            folder = self._evaluator.folder
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(hold_lock(folder / ".lock"))
            except BlockingIOError:  # `evaluate --follow` is at work, and two processes must not write one cache
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minisft-")))
            workers = stack.enter_context(self._workers())
            evaluator = replace(self._evaluator, workers=workers, folder=folder)
            scored = evaluator.evaluate_model(checkpoint.name, checkpoint)
        if self.metric not in scored.scores:
            error = evaluator.failures[self.metric]
            fix = f"{error.fix}; then resume with --resume: {checkpoint.name} is complete, and is scored first"
            raise UserError(error.where, error.problem, fix)
        return scored.scores[self.metric].score

    def _workers(self) -> Workers:
        return Workers(self._placement.processes, self._placement.gpus_each)
