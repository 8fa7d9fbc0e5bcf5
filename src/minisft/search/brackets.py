"""The brackets of a search: how many trials the budget pays for, and which of a bracket go on from rung to rung."""

from collections.abc import Sequence

from minisft.errors import UserError
from minisft.search.budget import BRACKET, RUNGS, Budget, affordable_trials, bracket_sizes, trials_cost
from minisft.search.halving import decide
from minisft.search.rung_losses import read_seconds
from minisft.search.search_result import write_result
from minisft.search.space import Axis, Choices, Range, count_combinations, own_settings
from minisft.search.statistics import cost
from minisft.search.trial_runner import TrialRunner
from minisft.search.trials import Trials, training_seconds
from minisft.text import duration

_MOST_PROBES = 3  # trials that are tried to measure the time of a run


def run_brackets(runner: TrialRunner, budget: Budget | None) -> None:
    """Train the trials of all brackets that the budget pays for, and write search.json after every rung.

    Raises:
        UserError: The budget is too small, or all trials failed.
    """
    trials = runner.trials
    count = _number_of_trials(runner, budget)
    brackets: list[int] = list(trials.study.facts.get("brackets", []))
    brackets += bracket_sizes(count - sum(brackets))
    trials.study.record("brackets", brackets)
    trials.study.expect(sum(brackets))
    runner.progress.total = sum(trials_cost(size) for size in brackets)
    start = 0
    for bracket, size in enumerate(brackets):
        _run_bracket(runner, bracket, range(start, start + size))
        start += size
    if trials.best_and_ties() is None:
        first = min(trials.failed)
        number = f"all {start}" if len(trials.failed) == start else f"{len(trials.failed)} of {start}"
        problem = f"{number} trials failed, and none reached its end; the first: {trials.failed[first]}"
        raise UserError(trials.output, problem, f"see {trials.log(first)}; vary other values, or other keys")


def _run_bracket(runner: TrialRunner, bracket: int, numbers: Sequence[int]) -> None:
    trials = runner.trials
    while len(trials) <= numbers[-1] and trials.add():
        pass
    size = len(numbers)
    numbers = [number for number in numbers if number < len(trials)]
    alive = [number for number in numbers if runner.load(number)]
    stopped: dict[int, str] = {}  # at the rung before: kept until enough others have reached this one
    for rung, fraction in enumerate(RUNGS):
        # 1. Train; the place of a trial that fails goes to the best of those that were stopped at the rung before.
        runner.train(alive, rung)
        spare = sorted(stopped, key=lambda number: cost(trials.scores[number][-1]))
        while spare and sum(len(trials.scores[number]) > rung for number in numbers) < len(alive):
            runner.train([spare[0]], rung)
            stopped.pop(spare.pop(0))
        for number, reason in stopped.items():
            runner.stop(number, reason)
        # 2. Decide.
        reached = [[trials.scores[n][r] for n in numbers if len(trials.scores[n]) > r] for r in range(rung + 1)]
        if not reached[rung]:
            return
        decision = decide(size, rung, reached, trials.seed, bracket=bracket)
        alive, stopped = decision.going_on, dict(decision.stopped)
        if fraction == 1:
            for number in alive:
                trials.study.finish(number, "complete", trials.scores[number][-1].value)
        write_result(trials)


def _number_of_trials(runner: TrialRunner, budget: Budget | None) -> int:
    """Return how many trials the budget pays for.

    Raises:
        UserError: It pays for less than one.
    """
    axes = runner.trials.axes
    listed = count_combinations(axes)
    if budget is None:
        only_lists = listed is not None and all(isinstance(axis, Choices) for axis in axes)
        count = listed if only_lists and listed is not None else BRACKET
    elif budget.kind == "trials":
        count = int(budget.amount)
    else:
        runs = budget.amount
        if budget.kind == "seconds":
            seconds = _seconds_of_run(runner)
            runs /= seconds
            if runs < 1:
                problem = f"one run of this recipe takes about {duration(seconds)} here, and no trial would end"
                fix = f"give at least {1 + int(seconds / 60)}m, and --resume: the trial that was begun goes on"
                raise UserError("--budget", problem, fix)
        count = max(1, affordable_trials(runs / _relative_length(runner.trials)))
    return count if listed is None else min(count, listed)


def _relative_length(trials: Trials) -> float:
    """Return the mean length of a trial, in runs of the recipe: only varied epochs and steps change it."""
    for axis in trials.axes:
        if axis.key in ("training.epochs", "training.max_steps"):
            own = own_settings(trials.recipe, [axis])[axis.key]
            values = _numbers(axis)
            if own and values:
                return sum(values) / len(values) / float(own)
    return 1.0


def _numbers(axis: Axis) -> list[float]:
    """Return the ends of a range, or the values of a list of numbers; [] if one of them is no number."""
    values = [axis.low, axis.high] if isinstance(axis, Range) else [axis.value(text) for text in axis.texts]
    return [float(value) for value in values] if all(isinstance(value, int | float) for value in values) else []


def _seconds_of_run(runner: TrialRunner) -> float:
    """Return the seconds of a full run with its validation, measured once with the first rung of a trial."""
    trials = runner.trials
    known = trials.study.facts.get("seconds_of_run")
    if known is not None:
        return float(known)
    for number in range(_MOST_PROBES):
        if len(trials) <= number and not trials.add():
            break
        if runner.load(number):
            runner.train([number], 0)
        if trials.scores[number]:
            steps = trials.steps[number]
            training = training_seconds(trials.run(number), steps[0])
            validation = read_seconds([trials.losses_file(number, 0)])
            seconds = (training * steps[-1] / steps[0] + validation * len(RUNGS)) / _relative_length(trials)
            trials.study.record("seconds_of_run", seconds)
            return seconds
    problem = f"the first trials failed, so the time of a run is unknown: {next(iter(trials.failed.values()), '')}"
    raise UserError("--budget", problem, "give a number of trials, or fix what made them fail")
