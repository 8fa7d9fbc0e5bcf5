"""Decisions from planted losses: which trials go on, which is best, and which cannot be told apart."""

import numpy as np
import pytest

from minisft.search.budget import BRACKET, RUNGS
from minisft.search.halving import best_and_ties, decide
from minisft.search.statistics import RowLosses

ROWS = 60


def planted(trial, mean, seed, noise=0.05):
    """Losses of a trial: difficult and easy rows, which all trials share, and noise of its own."""
    shared = np.random.default_rng([seed, 1000]).gamma(4.0, 0.1, ROWS)
    tokens = np.random.default_rng([seed, 2000]).integers(5, 50, ROWS)
    own = np.random.default_rng([seed, trial]).normal(0.0, noise, ROWS)
    return RowLosses(trial, (mean + shared + own) * tokens, tokens)


def halve(means, seed, noise=0.05):
    """Run a bracket whose trial has these mean losses at the rungs; return the best trial and its ties."""
    losses: dict[int, list[RowLosses]] = {trial: [] for trial in range(len(means))}
    alive = list(losses)
    for rung in range(len(RUNGS)):
        for trial in alive:
            losses[trial].append(planted(trial, means[trial][rung], 100 * seed + rung, noise))
        reached = [[losses[t][r] for t in losses if len(losses[t]) > r] for r in range(rung + 1)]
        alive = decide(len(means), rung, reached, seed).going_on
    return best_and_ties(losses, seed)


def test_a_best_setting_by_a_known_margin_is_found_and_named_alone():
    found = [halve([[1.0 + 0.1 * (t != 5)] * len(RUNGS) for t in range(BRACKET)], seed) for seed in range(20)]
    assert sum(one == (5, []) for one in found) >= 19


def test_a_tie_is_reported_as_a_tie():
    found = [halve([[1.0 + 0.2 * (t not in (2, 5))] * len(RUNGS) for t in range(BRACKET)], seed) for seed in range(20)]
    ties = [best is not None and {best[0], *best[1]} == {2, 5} for best in found]
    assert sum(ties) >= 18


def test_equal_trials_are_rarely_told_apart_although_each_search_looks_at_several_rungs():
    """0.05 and two standard errors of 200 searches of eight equal trials, half of which are stopped at each rung."""
    found = [halve([[1.0] * len(RUNGS)] * BRACKET, seed) for seed in range(200)]
    wrong = sum(best is None or len(best[1]) < BRACKET - 1 for best in found)
    assert wrong / 200 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def test_half_goes_on_at_each_rung_and_the_last_one_is_complete():
    losses = [planted(trial, 1.0 + 0.1 * trial, 0) for trial in range(BRACKET)]
    decision = decide(BRACKET, 0, [losses], 0)
    assert decision.going_on == [0, 1, 2, 3]
    assert decision.stopped == dict.fromkeys(range(4, BRACKET), "rung")
    assert decide(BRACKET, 3, [losses[:1]] * 4, 0).going_on == [0]


def test_failed_trials_leave_their_place_to_others():
    losses = [planted(trial, 1.0 + 0.1 * trial, 0) for trial in (1, 4, 5, 6)]
    assert decide(BRACKET, 0, [losses], 0).going_on == [1, 4, 5, 6]


def test_worse_at_one_rung_alone_stops_nothing_of_the_better_half():
    first = [planted(trial, mean, 0) for trial, mean in enumerate((1.0, 1.5, 2.0, 2.1))]
    assert decide(4, 0, [first], 0).going_on == [0, 1]


@pytest.mark.parametrize(("later", "goes_on"), [(1.6, False), (1.2, True)])
def test_worse_at_two_rungs_in_a_row_is_stopped_unless_it_catches_up(later, goes_on):
    first = [planted(trial, 1.0 + 0.5 * trial, 0) for trial in range(8)]
    second = [planted(0, 1.0, 1), planted(1, later, 1), planted(2, 2.0, 1), planted(3, 2.5, 1)]
    decision = decide(8, 1, [first, second], 0)
    assert decision.going_on == ([0, 1] if goes_on else [0])
    assert decision.stopped == {2: "rung", 3: "rung"} | ({} if goes_on else {1: "worse"})


def test_without_a_complete_trial_there_is_no_best():
    assert best_and_ties({0: [planted(0, 1.0, 0)], 1: []}, 0) is None
