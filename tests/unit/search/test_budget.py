"""Budgets and what they pay for."""

import pytest

from minisft.errors import UserError
from minisft.search.budget import Budget, affordable_trials, bracket_sizes, kept_at, read_budget, trials_cost


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("30m", Budget("seconds", 1800)), ("90s", Budget("seconds", 90)), ("1.5h", Budget("seconds", 5400)),
        ("3x", Budget("runs", 3)), ("2.5x", Budget("runs", 2.5)), ("20", Budget("trials", 20)),
    ],
)  # fmt: skip
def test_one_syntax(text, budget):
    assert read_budget(text) == budget


@pytest.mark.parametrize("text", ["", "abc", "-3", "0", "0m", "3.5", "0.05x", "0.9x", "3 x", "1e3", "3d"])
def test_what_is_no_budget_or_pays_for_no_trial_is_refused(text):
    with pytest.raises(UserError, match="--budget"):
        read_budget(text)


def test_below_one_rung_is_said():
    with pytest.raises(UserError, match="less than the first rung"):
        read_budget("0.1x")


def test_eight_trials_cost_two_and_a_half_runs():
    assert [kept_at(8, rung) for rung in range(4)] == [8, 4, 2, 1]
    assert trials_cost(8) == 8 / 8 + 4 / 8 + 2 / 4 + 1 / 2
    assert trials_cost(1) == 1
    assert trials_cost(20) == 2 * 2.5 + trials_cost(4)
    assert list(bracket_sizes(20)) == [8, 8, 4]


def test_the_most_trials_that_fit_are_paid_for():
    for runs in (1, 2.5, 3, 7.3):
        count = affordable_trials(runs)
        assert trials_cost(count) <= runs < trials_cost(count + 1)
    assert affordable_trials(0.9) == 0
