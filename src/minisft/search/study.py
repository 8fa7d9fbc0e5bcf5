"""The trials of a search in Optuna's storage: which settings they have, and how far they have come.

The storage is the memory of a search: killed at any moment, it goes on from there. Settings are drawn so that they
depend only on the seed, the number of the trial and the trials before it, never on the moment of a kill.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minisft.errors import UserError
from minisft.search.budget import BRACKET
from minisft.search.space import Axis, Range, Settings, combinations, count_combinations
from minisft.text import first_line

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_SETTINGS = "settings"  # user attribute of a trial: the values as JSON
_ATTEMPTS = 20  # to draw settings that no trial has yet
_JOURNAL = "journal:"
STORAGE_FILE = "search.db"


class Study:
    """The study of one search.

    Args:
        url: `sqlite:///PATH`, another database's URL, or `journal:PATH` for a file that grows line by line.
        name: Name of the study in the storage.
        axes: What is varied.
        seed: Seed of the sampler.
        higher_is_better: Whether a higher objective is better.

    Raises:
        UserError: The storage cannot be opened or written.
    """

    def __init__(self, url: str, name: str, axes: Sequence[Axis], seed: int, *, higher_is_better: bool = False) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.axes, self._seed = list(axes), seed
        self._direction: Literal["minimize", "maximize"] = "maximize" if higher_is_better else "minimize"
        self._expected = 0  # number of trials that the budget pays for
        try:
            self._study = optuna.create_study(
                study_name=name, storage=_storage(url), direction=self._direction, load_if_exists=True
            )
        except Exception as error:  # each database and driver raises errors of its own
            problem = f"the storage cannot be opened or written ({type(error).__name__}: {first_line(error)})"
            fix = "check the path or the address, or leave --storage out for a file in the output folder"
            raise UserError(f"--storage {url}", problem, fix) from None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What `record` recorded."""
        return dict(self._study.user_attrs)

    def record(self, key: str, value: Any) -> None:
        """Record a JSON value of the search."""
        self._study.set_user_attr(key, value)

    @property
    def settings(self) -> list[Settings]:
        """The settings of all trials, by number."""
        return [json.loads(trial.user_attrs[_SETTINGS]) for trial in self._study.get_trials(deepcopy=False)]

    def add_trial(self, wanted: Settings | None = None) -> Settings | None:
        """Add a trial in one write, and return its settings; None if every combination of listed values has a trial.

        Args:
            wanted: Settings to try; None: the next combination of listed values, or what Optuna's TPE sampler draws.
        """
        import optuna

        taken = [json.dumps(settings, sort_keys=True) for settings in self.settings]
        settings = wanted or self._next(taken)
        if settings is None:
            return None
        trial = optuna.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params={axis.key: _as_parameter(axis, settings[axis.key]) for axis in self.axes},
            distributions={axis.key: _distribution(axis) for axis in self.axes},
            user_attrs={_SETTINGS: json.dumps(settings)},
        )
        self._study.add_trial(trial)
        return settings

    def report(self, number: int, rung: int, value: float) -> None:
        """Report the objective of a trial at a rung, once."""
        import optuna

        trial = self._trial(number)
        if not trial.state.is_finished() and rung not in trial.intermediate_values:
            optuna.trial.Trial(self._study, trial._trial_id).report(value, rung)

    def finish(self, number: int, state: str, value: float | None = None) -> None:
        """Record the end of a trial, once: "complete" with its objective, "pruned" or "failed"."""
        from optuna.trial import TrialState

        if not self._trial(number).state.is_finished():
            states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
            self._study.tell(number, value, states[state])

    def importance(self) -> dict[str, float]:
        """Return the share of each key in the variation of the objective at the first rung, by Optuna's PED-ANOVA.

        The first rung is the only one that all trials reach. Below four trials, or with one key, it is empty.
        """
        import optuna
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        reached = [trial for trial in self._study.get_trials(deepcopy=False) if 0 in trial.intermediate_values]
        if len(self.axes) < 2 or len(reached) < 4:
            return {}
        first_rung = optuna.create_study(direction=self._direction)
        for trial in reached:
            first_rung.add_trial(
                optuna.create_trial(
                    params=trial.params, distributions=trial.distributions, value=trial.intermediate_values[0]
                )
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = get_param_importances(first_rung, evaluator=PedAnovaImportanceEvaluator())
        return {key: float(share) for key, share in shares.items() if share == share}

    def _trial(self, number: int) -> "optuna.trial.FrozenTrial":
        return self._study.get_trials(deepcopy=False)[number]

    def _next(self, taken: Sequence[str]) -> Settings | None:
        listed = count_combinations(self.axes)
        if listed is not None and len(taken) >= listed:
            return None
        choices = [axis for axis in self.axes if not isinstance(axis, Range)]
        if len(choices) == len(self.axes) and listed is not None and listed <= self._expected:
            return next(one for one in combinations(choices) if json.dumps(one, sort_keys=True) not in taken)
        for attempt in range(_ATTEMPTS):
            drawn = self._draw(len(taken), attempt)
            if json.dumps(drawn, sort_keys=True) not in taken:
                return drawn
        return drawn

    def expect(self, trials: int) -> None:
        """Say how many trials the budget pays for: as many combinations of listed values are all tried, in order."""
        self._expected = trials

    def _draw(self, number: int, attempt: int) -> Settings:
        """Draw settings with a sampler of their own, whose seed is that of the trial."""
        import numpy as np
        import optuna

        seed = int(np.random.SeedSequence([self._seed, number, attempt]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate sampling is called experimental
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=BRACKET)
        # In a copy of the study: a trial of the study itself is added in one write, when its settings are complete.
        copy = optuna.create_study(sampler=sampler, direction=self._direction)
        copy.add_trials(self._study.get_trials())
        drawn = copy.ask({axis.key: _distribution(axis) for axis in self.axes}).params
        return {axis.key: _as_value(axis, drawn[axis.key]) for axis in self.axes}


def _storage(url: str) -> Any:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if url.startswith(_JOURNAL):
        return JournalStorage(JournalFileBackend(url.removeprefix(_JOURNAL).removeprefix("//")))
    if "://" not in url:
        raise ValueError("it is no URL, such as sqlite:///study.db or journal:study.log")
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None)


def default_storage(output: Path) -> str:
    """Return the URL of the database in the output folder of a search."""
    return f"sqlite:///{output.resolve() / STORAGE_FILE}"


def _distribution(axis: Axis) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(axis, Range):
        return CategoricalDistribution(axis.texts)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high))
    return FloatDistribution(axis.low, axis.high, log=axis.logarithmic)


def _as_parameter(axis: Axis, value: Any) -> Any:
    if isinstance(axis, Range):
        return int(value) if axis.whole else float(value)
    return next(text for text in axis.texts if axis.value(text) == value)


def _as_value(axis: Axis, parameter: Any) -> Any:
    """Return the value of a parameter; floats with four digits, so that they can be read and written."""
    if not isinstance(axis, Range):
        return axis.value(parameter)
    return int(parameter) if axis.whole else min(max(float(f"{parameter:.4g}"), axis.low), axis.high)
