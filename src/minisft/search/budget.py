"""The budget of a search: `30m`, `3x` or `20`, and the number of trials that it pays for.

Costs are counted in runs of the recipe as it is written. A bracket of n trials trains all of them to the first rung,
the better half of them to the second, and so on (successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from minisft.errors import UserError

RUNGS = (0.125, 0.25, 0.5, 1.0)  # fractions of the supervised tokens of a trial's run
BRACKET = 8  # trials that are halved together; later brackets learn from earlier ones
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|x)?")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Budget:
    """What a search may cost.

    Args:
        kind: Whether `amount` counts seconds, runs of the recipe, or trials.
        amount: The amount.
    """

    kind: Literal["seconds", "runs", "trials"]
    amount: float

    def __post_init__(self) -> None:
        if self.kind == "trials" and (self.amount < 1 or self.amount != int(self.amount)):
            problem = f"{self.amount:g} is no number of trials"
            raise UserError("--budget", problem, "give 1 or more trials, a time such as 30m, or runs such as 3x")
        if self.kind == "runs" and self.amount < 1:
            below = "less than the first rung" if self.amount < RUNGS[0] else "and no trial would reach its end"
            problem = f"{self.amount:g}x is {self.amount:g} of one run, {below}"
            raise UserError(
                "--budget", problem, f"give 1x or more; {trials_cost(BRACKET):g}x pays for {BRACKET} trials"
            )
        if self.amount <= 0:
            raise UserError("--budget", "it is zero", "give a time such as 30m, runs such as 3x, or a number of trials")


def read_budget(text: str) -> Budget:
    """Read `30m` (also `90s`, `2h`), `3x` (three times the time of one full run) or `20` (trials).

    Raises:
        UserError: It is none of these, or too small for a trial.
    """
    found = _BUDGET.fullmatch(text.strip())
    if found is None:
        problem = f"{text!r} is no budget"
        raise UserError("--budget", problem, "give a time such as 30m or 2h, runs such as 3x, or a number of trials")
    amount, unit = float(found[1]), found[2]
    if unit is None:
        return Budget("trials", amount)
    return Budget("runs", amount) if unit == "x" else Budget("seconds", amount * _SECONDS[unit])


def kept_at(trials: int, rung: int) -> int:
    """Return how many of a bracket's trials are trained to a rung, numbered from 0: all, a half, a quarter, ..."""
    return math.ceil(trials / 2**rung)


def trials_cost(trials: int) -> float:
    """Return what so many trials cost, in full runs."""
    return sum(_bracket_cost(size) for size in bracket_sizes(trials))


def _bracket_cost(size: int) -> float:
    begun = (0.0, *RUNGS[:-1])
    return sum(kept_at(size, rung) * (end - start) for rung, (start, end) in enumerate(zip(begun, RUNGS, strict=True)))


def bracket_sizes(trials: int) -> Iterator[int]:
    """Yield the number of trials of each bracket."""
    while trials > 0:
        yield min(BRACKET, trials)
        trials -= BRACKET


def affordable_trials(runs: float) -> int:
    """Return the largest number of trials that cost at most so many full runs; 0 if not even one does."""
    count = 0
    while count < _MOST_TRIALS and trials_cost(count + 1) <= runs:
        count += 1
    return count
