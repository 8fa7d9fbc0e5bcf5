"""The search: trials pause at rungs, the better half goes on, and the winner is an ordinary run that is complete.

Everything that is decided follows from the losses or scores on disk and from the settings in Optuna's storage. A
search that was killed replays its decisions from them, and goes on with what is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.console import say
from minisft.errors import UserError
from minisft.metric_names import LOSS
from minisft.optional_packages import require_package
from minisft.recipe import Recipe
from minisft.search.brackets import run_brackets
from minisft.search.budget import read_budget
from minisft.search.final_scores import score_on_test_rows, write_best_recipes
from minisft.search.objective import read_objective, with_objective
from minisft.search.page import write_search_page
from minisft.search.progress import SearchProgress
from minisft.search.search_result import read_result, write_result
from minisft.search.search_setup import (
    default_axes,
    only_search,
    prepare_rows,
    refuse_folder,
    refuse_other_study,
    require_feasible_values,
    search_identity,
    with_fixed_split,
    with_validation,
)
from minisft.search.space import read_axes
from minisft.search.study import Study, default_storage
from minisft.search.trial_pool import TrialPool
from minisft.search.trial_runner import TrialRunner
from minisft.search.trials import Trials


@dataclass(frozen=True)
class SearchOptions:
    """The options of `minisft search`.

    Args:
        varied: `KEY=LOW..HIGH` and `KEY=A,B,C` words; none: learning rate, epochs, batch size and LoRA's rank.
        budget: `30m`, `3x` or `20`; None: every combination of listed values, or 8 trials if a range is varied.
        validation: Fraction of the train conversations on which trials are compared; None: the recipe's
            `data.validation_fraction`, or 0.1.
        workers: Number of processes that train trials at the same time.
        storage: URL of Optuna's storage; None: a SQLite file in the output folder.
        seed: Seed of the sampler and of the bootstrap.
        resume: Go on with the search in the output folder.
        defaults: Whether the recipe's own settings are trained to the end too, to be scored beside the winner.
        objective: What chooses the best trial: `loss`, or a metric of the answers to the validation rows.
    """

    varied: tuple[str, ...] = ()
    budget: str | None = None
    validation: float | None = None
    workers: int = 1
    storage: str | None = None
    seed: int = 0
    resume: bool = False
    defaults: bool = True
    objective: str = LOSS

    def __post_init__(self) -> None:
        if self.validation is not None and not 0 < self.validation < 1:
            problem = f"must be above 0 and below 1, and is {self.validation:g}"
            raise UserError("--validation", problem, "give a fraction of the train conversations such as 0.1")
        if self.seed < 0:
            raise UserError("--seed", f"{self.seed} is below zero", "give zero or more")


def search(
    recipe: Recipe, options: SearchOptions, on_result: Callable[[dict[str, Any]], object] | None = None
) -> dict[str, Any]:
    """Search the best settings of a recipe; return the content of search.json.

    Args:
        recipe: The recipe; its `output` is the folder of the search.
        options: What to vary, and for how long.
        on_result: Called with the content of search.json at the end.

    Raises:
        UserError: The options, the recipe, the data or the storage do not allow it, or all trials failed.
        StoppedError: SIGINT or SIGTERM arrived; the trials that were running have saved their work.
    """
    # 1. Refuse before anything is written.
    require_package("minisft search", "optuna")
    budget = None if options.budget is None else read_budget(options.budget)
    objective = read_objective(options.objective, recipe)
    output = Path(recipe.output)
    refuse_folder(output, resume=options.resume)
    axes = read_axes(options.varied or default_axes(recipe), recipe)
    require_feasible_values(recipe, axes)
    recipe = with_objective(with_fixed_split(recipe, axes), objective)
    with only_search(output), TrialPool(options.workers, output / "processes.log") as pool:
        # 2. Open the study, and prepare the data: validation rows for the trials, test rows for the end.
        study = Study(
            options.storage or default_storage(output),
            f"minisft {output.name}",
            axes,
            options.seed,
            higher_is_better=objective.higher_is_better,
        )
        trials_recipe = with_validation(recipe, options.validation)
        begun = bool(study.settings)
        refuse_other_study(
            study, search_identity(trials_recipe, axes, options.seed, objective.key), output, resume=options.resume
        )
        rows = prepare_rows(recipe, trials_recipe, axes, begun=begun)
        # 3. Train the trials.
        earlier = read_result(output)
        trials = Trials(rows, axes, study, options.seed, objective)
        progress = SearchProgress(output, objective.key)
        runner = TrialRunner(trials, pool, progress, keeps_own=options.defaults)
        run_brackets(runner, budget)
        # 4. Score the winner on the test rows, once.
        found = trials.best_and_ties()
        assert found is not None
        write_best_recipes(trials, found[0], recipe)
        result = write_result(trials, score_on_test_rows(runner, found[0], earlier, defaults=options.defaults))
        progress.print_verdict(result)
        say(f"written: {write_search_page(output)}")
    if on_result is not None:
        on_result(result)
    return result
