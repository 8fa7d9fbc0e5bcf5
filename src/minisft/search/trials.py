"""What is known of the trials of a search: their settings, losses, states, and the files that hold them.

Everything follows from the losses or scores on disk and from the settings in Optuna's storage, so that a search which
was killed knows the same again.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minisft.comparison.shared_files import begin_variant
from minisft.recipe import Recipe
from minisft.run_folder import RunFolder
from minisft.search.halving import best_and_ties
from minisft.search.objective import Objective, read_scores
from minisft.search.rung_losses import rung_steps
from minisft.search.space import Axis, Range, checked, holds, own_settings
from minisft.search.statistics import TrialScores
from minisft.search.study import Study
from minisft.search.training_rows import TrainingRows

SHARED_FILES = ("dataset", "base_model.json")  # of a run folder, which all trials share


class Trials:
    """The trials of a search.

    Args:
        rows: The prepared rows. Their `recipe` is that of the trials; its `output` is the search's folder.
        axes: What is varied.
        study: The trials in Optuna's storage.
        seed: Seed of the bootstrap.
        objective: What the search optimizes.

    Attributes:
        scores: Of each trial, its losses or scores at the rungs that it has reached.
        steps: Of each trial that can be trained, the steps of all rungs.
        stopped: Of each trial that was stopped early, the reason.
        failed: Of each trial that failed, the error.
    """

    def __init__(self, rows: TrainingRows, axes: Sequence[Axis], study: Study, seed: int, objective: Objective) -> None:
        self.objective = objective
        self.rows, self.axes, self.study, self.seed = rows, axes, study, seed
        self.recipe = recipe = rows.recipe
        self.output = Path(recipe.output)
        self.scores: dict[int, list[TrialScores]] = {}
        self.steps: dict[int, list[int]] = {}
        self.stopped: dict[int, str] = {}
        self.failed: dict[int, str] = {}
        for folder in ("trials", "losses"):
            (self.output / folder).mkdir(exist_ok=True)

    def __len__(self) -> int:
        return len(self.study.settings)

    def add(self) -> bool:
        """Add a trial; the first one has the recipe's own settings, unless every combination is tried in order.

        Returns:
            False if every combination of listed values has a trial.
        """
        own = own_settings(self.recipe, self.axes)
        is_first = not len(self) and any(isinstance(axis, Range) for axis in self.axes)
        return self.study.add_trial(own if is_first and holds(self.axes, own) else None) is not None

    def make_folder(self, number: int) -> None:
        """Make the run folder of a trial, unless that is done.

        Raises:
            UserError: The recipe refuses the trial's settings, or they change the validation rows.
        """
        self.scores.setdefault(number, [])
        if number in self.steps:
            return
        recipe = self.recipe_of(number)
        begin_variant(recipe, [self.rows.folder(recipe)], SHARED_FILES)
        self.steps[number] = rung_steps(self.rows.sizes(recipe), recipe)

    def read_rung(self, number: int, rung: int) -> bool:
        """Read the losses or scores of a trial at a rung, if they are there, and report the objective to Optuna.

        Returns:
            Whether they are there.
        """
        path = self.losses_file(number, rung)
        if len(self.scores[number]) <= rung and path.exists():
            self.scores[number].append(read_scores(path, number, self.objective))
            self.study.report(number, rung, self.scores[number][rung].value)
        return len(self.scores[number]) > rung

    def read_failure(self, number: int) -> bool:
        """Read the error of a trial that failed; return whether it did."""
        path = self.failure_file(number)
        if path.exists():
            self.failed[number] = str(json.loads(path.read_text(encoding="utf-8"))["error"])
            self.study.finish(number, "failed")
        return path.exists()

    def best_and_ties(self) -> tuple[int, list[int]] | None:
        """Return the best complete trial, and those that cannot be told apart from it; None if none is complete."""
        sound = {number: reached for number, reached in self.scores.items() if number not in self.failed}
        return best_and_ties(sound, self.seed)

    def recipe_of(self, number: int) -> Recipe:
        """Return the recipe of a trial.

        Raises:
            UserError: The recipe refuses its settings.
        """
        return replace(checked(self.recipe, self.study.settings[number]), output=str(self.run(number).root))

    def is_own(self, number: int) -> bool:
        """Return whether a trial has the recipe's own settings."""
        return self.study.settings[number] == own_settings(self.recipe, self.axes)

    # --- files

    def run(self, number: int) -> RunFolder:
        return RunFolder(self.output / "trials" / str(number))

    def log(self, number: int) -> Path:
        return self.output / "trials" / f"{number}.log"

    def losses_file(self, number: int, rung: int) -> Path:
        return self.output / "losses" / f"trial-{number}-rung-{rung}.npz"

    def answers_folder(self) -> Path:
        """Return the folder for the answers of all trials to the validation prompts, if the objective is a metric."""
        return self.output / "validation"

    def failure_file(self, number: int) -> Path:
        return self.output / "losses" / f"trial-{number}-failed.json"


def training_seconds(run: RunFolder, step: int) -> float:
    """Return the seconds of the steps of a run up to a step."""
    if not run.metrics.exists():
        return 0.0
    lines = (json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return round(sum(line["seconds"] for line in lines if line["step"] <= step), 3)
