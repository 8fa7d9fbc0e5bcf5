"""The comparison of trials against planted truths, a loop over resamples, and simulated coverage."""

from itertools import permutations

import numpy as np
import pytest

from minisft.evaluation.resampling import RESAMPLES, resampled_rows
from minisft.search.budget import RUNGS
from minisft.search.statistics import (
    ERROR_RATE,
    VERDICT_LEVEL,
    RowLosses,
    best_trial,
    cheapest,
    clearly_worse,
    estimate,
    indistinguishable,
    stop_level,
)

SEEDS = range(20)
ROWS = 100


def planted(seed, margins, rows=ROWS, noise=0.1):
    """Return one trial per margin: rows differ by far more than trials do, and trials by `noise` on each row."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 200, rows)
    difficulty = draw.gamma(4.0, 0.5, rows)
    return [
        RowLosses(10 * place, (difficulty + margin + draw.normal(0, noise, rows)) * tokens, tokens)
        for place, margin in enumerate(margins)
    ]


def test_a_planted_best_is_found_and_nothing_is_indistinguishable_from_it():
    found = 0
    for seed in SEEDS:
        trials = planted(seed, [0.2, 0.1, 0.1, 0.0, 0.1, 0.3, 0.1, 0.5])
        found += best_trial(trials) == 30 and indistinguishable(trials, seed) == []
    assert found >= 19


def test_the_rows_of_one_trial_alone_would_not_show_that_best():
    """The margin lies inside the intervals of the single trials: only the pairs show it."""
    one, two = (estimate(rows) for rows in planted(0, [0.0, 0.1]))
    assert one.high > two.low


@pytest.mark.parametrize("margins", [[0.0, 0.0], [0.4, 0.0, 0.4, 0.0, 0.4], [0.0] * 8], ids=len)
def test_a_planted_tie_is_reported_as_a_tie(margins):
    tied = {10 * place for place, margin in enumerate(margins) if margin == 0}
    reported = 0
    for seed in SEEDS:
        trials = planted(seed, margins)
        reported += {best_trial(trials), *indistinguishable(trials, seed)} == tied
    assert reported >= 18


def test_equal_trials_are_called_worse_within_the_level_however_many_trials_there_are():
    """0.05 and two standard errors of 200 sets of 12 trials, which are 66 pairs each."""
    wrong = sum(clearly_worse(planted(seed, [0.0] * 12, rows=30), seed, level=0.05) != [] for seed in range(200))
    assert wrong / 200 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def test_the_levels_of_a_search_add_up_to_its_error_rate():
    spent = len(RUNGS) * VERDICT_LEVEL + sum(stop_level(bracket) for bracket in range(100_000))
    assert spent <= ERROR_RATE
    assert spent == pytest.approx(ERROR_RATE, rel=1e-4)


def test_a_trial_is_compared_with_the_one_that_is_named():
    trials = planted(0, [0.0, 0.3, 0.3, 0.6])
    assert clearly_worse(trials, than=10) == [30]
    assert clearly_worse(trials) == [10, 20, 30]


def test_trials_are_either_clearly_worse_or_indistinguishable_or_best():
    trials = planted(3, [0.02, 0.3, 0.0, 0.01, 0.3])
    worse, tied = clearly_worse(trials), indistinguishable(trials)
    assert worse == [10, 40]
    assert sorted([best_trial(trials), *tied, *worse]) == [rows.trial for rows in trials]
    assert (worse, tied) == (clearly_worse(trials), indistinguishable(trials))  # the seed decides


def test_the_verdict_equals_that_of_a_loop_over_resamples():
    """Romano and Wolf 2005 with studentised resamples, one resample and one pair after the other."""
    for seed in range(4):
        trials = planted(seed, [0.0, 0.03, 0.05, 0.02], rows=25)
        observed = {(a.trial, b.trial): _loop_statistic(a, b, np.arange(25), 0.0) for a, b in permutations(trials, 2)}
        equal, best = set(observed), best_trial(trials)
        while equal:
            maxima = [
                max(
                    _loop_statistic(a, b, rows, a.loss - b.loss)
                    for a, b in permutations(trials, 2)
                    if (a.trial, b.trial) in equal
                )
                for rows in resampled_rows(25, seed)
            ]
            p_values = {pair: (1 + sum(m >= observed[pair] for m in maxima)) / (1 + RESAMPLES) for pair in equal}
            beyond = {pair for pair in equal if p_values[pair] <= VERDICT_LEVEL}
            if not beyond:
                break
            equal -= beyond | {(b, a) for a, b in beyond}
        told_apart = {
            a for a, b in permutations([rows.trial for rows in trials], 2) if (a, b) not in equal and b == best
        }
        assert set(clearly_worse(trials, seed)) == told_apart


def _loop_statistic(a, b, rows, centre):
    difference, tokens = (a.sums - b.sums)[rows], a.tokens[rows]
    ratio = difference.sum() / tokens.sum()
    variance = np.var(difference - ratio * tokens, ddof=1) * len(rows) / tokens.sum() ** 2
    return (ratio - centre) / np.sqrt(variance)


def test_the_interval_covers_the_true_loss_in_95_of_100_data_sets():
    """The truth is the ratio of expectations: long rows count for more, and have a lower loss here."""
    draw = np.random.default_rng(1)

    def sample(rows):
        tokens = draw.integers(5, 200, rows)
        return RowLosses(0, draw.gamma(4.0, 0.5, rows) * (300 - tokens) / 100 * tokens, tokens)

    truth = sample(1_000_000).loss
    covered = []
    for seed in range(400):
        interval = estimate(sample(ROWS), seed)
        assert interval.low < interval.value < interval.high
        covered.append(interval.low <= truth <= interval.high)
    assert 0.92 <= np.mean(covered) <= 0.98  # 0.95 and nearly three standard errors


def test_an_exact_copy_is_never_told_apart_and_an_exact_shift_always_is():
    tokens = np.arange(1, 31)
    sums = np.linspace(1, 40, 30)
    same = [RowLosses(1, sums, tokens), RowLosses(2, sums.copy(), tokens.copy())]
    assert indistinguishable(same) == [2]
    assert best_trial(same) == 1
    shifted = [RowLosses(1, sums + 0.01 * tokens, tokens), RowLosses(2, sums, tokens)]
    assert clearly_worse(shifted) == [1]


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_four_rows_or_fewer_tell_no_trials_apart(rows):
    trials = planted(0, [0.0, 5.0, 9.0], rows=rows)
    assert indistinguishable(trials) == [10, 20]


def test_one_trial_is_the_best_one():
    assert (best_trial(planted(0, [0.0])), clearly_worse(planted(0, [0.0])), indistinguishable(planted(0, [0.0]))) == (
        0,
        [],
        [],
    )


def test_the_cheapest_is_chosen_and_of_equals_the_first():
    assert cheapest([3, 1, 2], {1: 5.0, 2: 4.0, 3: 6.0}) == 2
    assert cheapest([3, 1, 2], {1: 4.0, 2: 4.0, 3: 4.0}) == 3


@pytest.mark.parametrize(
    ("sums", "tokens", "problem"),
    [
        ([1.0, 2.0], [3], "must both be"),
        ([[1.0]], [[3]], "must both be"),
        ([], [], "must both be"),
        ([1.0, np.nan], [3, 4], "the loss of row 1 is nan"),
        ([np.inf, 1.0], [3, 4], "the loss of row 0 is inf"),
        ([1.0, 2.0], [3, 0], "row 1 has no supervised token"),
    ],
)
def test_broken_rows_are_refused(sums, tokens, problem):
    with pytest.raises(ValueError, match=f"trial 7: .*{problem}"):
        RowLosses(7, np.array(sums), np.array(tokens))


@pytest.mark.parametrize("compare", [best_trial, clearly_worse, indistinguishable])
def test_trials_of_other_rows_are_refused(compare):
    rows = RowLosses(1, np.ones(3), np.array([4, 5, 6]))
    other = RowLosses(2, np.ones(3), np.array([4, 5, 7]))
    fewer = RowLosses(3, np.ones(2), np.array([4, 5]))
    for trials, problem in [
        ([rows, other], "trials 1 and 2 were not scored on the same rows"),
        ([rows, fewer], "trials 1 and 3 were not scored on the same rows"),
        ([rows, rows], "two trials have the same number"),
        ([], "there is no trial"),
    ]:
        with pytest.raises(ValueError, match=problem):
            compare(trials)
