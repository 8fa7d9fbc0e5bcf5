"""Training trials to their rungs, in the processes of the pool; what fails or is stopped is recorded."""

import json
from collections.abc import Sequence

from minisft.console import warn
from minisft.errors import UserError
from minisft.files import write_atomically
from minisft.recipe import Recipe
from minisft.search.budget import RUNGS
from minisft.search.progress import SearchProgress
from minisft.search.search_result import trial_entries, write_result
from minisft.search.trial_pool import Job, TrialPool
from minisft.search.trials import Trials


class TrialRunner:
    """Trains the trials of a search.

    Args:
        trials: The trials.
        pool: The processes.
        progress: What is seen of the search.
        keeps_own: Whether the trial with the recipe's own settings will be trained to its end, even if it is stopped.
    """

    def __init__(self, trials: Trials, pool: TrialPool, progress: SearchProgress, *, keeps_own: bool) -> None:
        self.trials, self.pool, self.progress, self.keeps_own = trials, pool, progress, keeps_own

    def load(self, number: int) -> bool:
        """Make the run folder of a trial; return whether it can be trained, and record that it failed if not."""
        try:
            self.trials.make_folder(number)
        except UserError as error:
            self._fail(number, str(error))
            return False
        return True

    def train(self, numbers: Sequence[int], rung: int) -> None:
        """Train trials to a rung, unless that is done, and read their losses or scores there."""
        trials = self.trials
        missing = [n for n in numbers if not trials.read_rung(n, rung) and not trials.read_failure(n)]
        jobs = [self._job(number, rung) for number in missing]
        self.progress.show(trial_entries(trials), jobs, rung, trials.steps)
        with self.progress.waiting():
            for job, outcome in self.pool.perform(jobs, self.progress.refresh):
                assert job.trial is not None
                if outcome.status == 0:
                    trials.read_rung(job.trial, rung)
                    self.progress.done += RUNGS[rung] - (RUNGS[rung - 1] if rung else 0.0)
                    self.progress.reached(trial_entries(trials)[job.trial], RUNGS[rung])
                else:
                    self._fail(job.trial, outcome.error)
                write_result(trials)

    def stop(self, number: int, reason: str) -> None:
        """Record that a trial is stopped early; its optimizer state is deleted, since it does not go on."""
        from minisft.training.checkpoints import drop_optimizer_states

        self.trials.stopped[number] = reason
        self.trials.study.finish(number, "pruned")
        if not (self.keeps_own and self.trials.is_own(number)):
            folder = self.trials.run(number).checkpoints
            drop_optimizer_states(folder, keep=folder)  # none is kept

    def _job(self, number: int, rung: int) -> Job:
        trials = self.trials
        recipe, steps = trials.recipe_of(number), trials.steps[number]
        is_last = rung == len(RUNGS) - 1
        return Job(
            "train",
            recipe.output,
            str(trials.log(number)),
            losses=str(trials.losses_file(number, rung)),
            trial=number,
            step=None if is_last else steps[rung],
            temporary_steps=tuple(step for step in steps[:-1] if not self._is_saved_anyway(recipe, step)),
            fingerprint=trials.rows.base.fingerprint,
            trust_remote_code=recipe.trust_remote_code,
            metric=None if trials.objective.metric is None else {"entry": trials.objective.metric},
            answers=str(trials.answers_folder()),
        )

    def _is_saved_anyway(self, recipe: Recipe, step: int) -> bool:
        """Return whether an ordinary run of the recipe has a checkpoint of this step."""
        training = recipe.training
        if training.save_every != "epoch":
            return step % int(training.save_every) == 0
        batch = training.batch_size * training.processes * training.gradient_accumulation
        return not training.packing and step % -(-len(self.trials.rows.sizes(recipe)) // batch) == 0

    def _fail(self, number: int, error: str) -> None:
        warn(f"trial {number} failed, and the others go on: {error}")
        write_atomically(self.trials.failure_file(number), json.dumps({"error": error}) + "\n")
        self.trials.failed[number] = error
        self.trials.study.finish(number, "failed")
