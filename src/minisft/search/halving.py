"""Which trials go on at a rung, and which cannot be told apart from the best: functions of held-out scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minisft.search.budget import RUNGS, kept_at
from minisft.search.statistics import TrialScores, clearly_worse, cost, stop_level


@dataclass(frozen=True)
class Decision:
    """What is decided about the trials of a bracket at a rung.

    Args:
        going_on: Numbers of the trials that are trained on, best first; at the last rung, those that are complete.
        stopped: The reason why each other trial is stopped, by its number.
    """

    going_on: list[int]
    stopped: dict[int, Literal["rung", "worse"]]


def decide(size: int, rung: int, losses: Sequence[Sequence[TrialScores]], seed: int, *, bracket: int = 0) -> Decision:
    """Decide which trials of a bracket go on after a rung.

    The better half goes on. A trial of that half is stopped too if it is worse than the best by more than chance at
    this rung and at the one before, and its distance has not shrunk between them: it is not catching up. One rung alone
    stops nothing of the better half, since curves of different learning rates cross.

    Args:
        size: Number of trials with which the bracket began.
        rung: Number of the rung, from 0.
        losses: For this rung and all before it, the losses of the trials that reached it, failed ones left out.
        seed: Seed of the resamples.
        bracket: Number of the bracket, from 0; later ones stop fewer trials early (`stop_level`).
    """
    here = losses[rung]
    order = [rows.trial for rows in sorted(here, key=lambda rows: (cost(rows), rows.trial))]
    if rung == len(RUNGS) - 1:
        return Decision(order, {})
    going_on = order[: kept_at(size, rung + 1)]
    stopped: dict[int, Literal["rung", "worse"]] = dict.fromkeys(order[len(going_on) :], "rung")
    if rung > 0 and len(going_on) > 1:
        best = going_on[0]
        both = losses[rung - 1], here
        level = stop_level(bracket)
        worse = set.intersection(*(set(clearly_worse(one, seed, than=best, level=level)) for one in both))
        distances = [_distances(one, best) for one in both]
        hopeless = [n for n in going_on if n in worse and distances[1][n] >= distances[0][n]]
        stopped |= dict.fromkeys(hopeless, "worse")
        going_on = [number for number in going_on if number not in hopeless]
    return Decision(going_on, stopped)


def _distances(losses: Sequence[TrialScores], best: int) -> dict[int, float]:
    means = {rows.trial: cost(rows) for rows in losses}
    return {number: mean - means[best] for number, mean in means.items()}


def best_and_ties(losses: Mapping[int, Sequence[TrialScores]], seed: int) -> tuple[int, list[int]] | None:
    """Return the best complete trial, and the trials that cannot be told apart from it; None if none is complete.

    A stopped trial is compared with the best at the last rung that it reached, on the same rows. Its losses there are
    why it was stopped, so the comparison accounts for all trials that reached the rung.

    Args:
        losses: Losses of each trial at the rungs that it reached, by its number.
        seed: Seed of the resamples.
    """
    last = {number: len(reached) - 1 for number, reached in losses.items() if reached}
    complete = [number for number, rung in last.items() if rung == len(RUNGS) - 1]
    if not complete:
        return None
    best = min(complete, key=lambda number: (cost(losses[number][-1]), number))
    tied: set[int] = set()
    for rung in range(len(RUNGS)):
        reached = [losses[number][rung] for number in last if last[number] >= rung]
        worse = clearly_worse(reached, seed, than=best)
        tied |= {number for number in last if last[number] == rung and number not in (best, *worse)}
    return best, sorted(tied)
