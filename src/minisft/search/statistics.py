"""Which trials of a search are worse than the best one, and which cannot be told apart from it.

All trials are scored on the same held-out rows, so two trials are compared by their differences row by row: the rows
that are hard for both cancel out (paired bootstrap).

The best trial is chosen by looking at all of them, and each may be the one that chance favours. The comparison accounts
for both with the model confidence set of Hansen, Lunde and Nason 2011, "The Model Confidence Set" (Econometrica 79,
453-497), with their range statistic: the largest difference between any two trials, in standard errors, is compared
with the distribution of that maximum under the hypothesis that all trials are equal. If it is beyond the quantile, the
worst trial is excluded, and the rest is tested again. With the probability of the level, asymptotically, no trial that
is as good as the best is excluded, however many there are.

A study looks at its trials up to five times: at four rungs and for its verdict. The level of each look is therefore
99 %, so that with a probability of 95 % no look excludes a trial that is as good as the best (Bonferroni).

The distribution comes from a studentised bootstrap: each resample is divided by its own standard error (Efron 1979;
Hall 1988, "Theoretical Comparison of Bootstrap Confidence Intervals"), which keeps the level with few rows too. Four
rows or fewer never exclude a trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minisft.evaluation.resampling import RESAMPLES, percentile_interval, resampled_rows

LOOKS = 5  # number of times that a study compares its trials: at four rungs, and for its verdict
_LEVEL = 0.05 / LOOKS  # the largest probability that one look excludes a trial that is as good as the best
FEWEST_ROWS = 5  # with fewer, more than 1 % of the resamples hold one row only, and have no standard error
_NO_SPREAD = 1e-12  # a standard error below this share of the loss is rounding


@dataclass(frozen=True)
class RowLosses:
    """Held-out losses of one trial at one rung.

    Args:
        trial: Number of the trial.
        sums: float64 (rows,): summed negative log-likelihood of the supervised tokens of each row, in nats. The rows
            have the same order for all trials.
        tokens: int64 (rows,): number of supervised tokens of each row.

    Raises:
        ValueError: The arrays differ in shape, are empty, or hold a loss that is not finite or a row without tokens.
    """

    trial: int
    sums: np.ndarray
    tokens: np.ndarray

    def __post_init__(self) -> None:
        if self.sums.ndim != 1 or self.sums.shape != self.tokens.shape or not len(self.sums):
            shapes = f"{self.sums.shape} and {self.tokens.shape}"
            raise ValueError(f"trial {self.trial}: sums and tokens must both be (rows,), and are {shapes}")
        if not np.isfinite(self.sums).all():
            row = int(np.argmin(np.isfinite(self.sums)))
            raise ValueError(f"trial {self.trial}: the loss of row {row} is {self.sums[row]}: this trial has failed")
        if not (self.tokens >= 1).all():
            row = int(np.argmin(self.tokens >= 1))
            raise ValueError(f"trial {self.trial}: row {row} has no supervised token: leave it out for all trials")

    @property
    def loss(self) -> float:
        """Mean loss per supervised token, in nats."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Estimate:
    """A held-out loss, in nats per supervised token, and its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(rows: RowLosses, seed: int = 0) -> Estimate:
    """Return the mean loss per supervised token, with a 95 % percentile bootstrap interval over rows.

    With few rows the interval is too narrow; `minisft.results.MIN_CONVERSATIONS` is the fewest that support one. The
    interval is that of one trial alone: two trials whose intervals overlap may still differ on the same rows.

    Args:
        rows: Losses of one trial.
        seed: Seed of the resamples.
    """
    draws = resampled_rows(len(rows.sums), seed)
    low, high = percentile_interval(rows.sums[draws].sum(axis=1) / rows.tokens[draws].sum(axis=1))
    return Estimate(rows.loss, low, high)


def best_trial(trials: Sequence[RowLosses]) -> int:
    """Return the number of the trial with the lowest loss; of equals, the first.

    Raises:
        ValueError: There is no trial, or the trials were not scored on the same rows.
    """
    _require_same_rows(trials)
    return min(trials, key=lambda rows: rows.loss).trial


def clearly_worse(trials: Sequence[RowLosses], seed: int = 0) -> list[int]:
    """Return the numbers of the trials that are worse than the best one by more than chance, in the order given.

    Args:
        trials: Losses of all trials on the same rows.
        seed: Seed of the resamples.

    Raises:
        ValueError: There is no trial, or the trials were not scored on the same rows.
    """
    kept = _confidence_set(trials, seed)
    return [rows.trial for rows in trials if rows.trial not in kept]


def indistinguishable(trials: Sequence[RowLosses], seed: int = 0) -> list[int]:
    """Return the numbers of the trials that cannot be told apart from the best one, without it.

    Args:
        trials: Losses of all trials on the same rows.
        seed: Seed of the resamples.

    Raises:
        ValueError: There is no trial, or the trials were not scored on the same rows.
    """
    kept = _confidence_set(trials, seed) - {best_trial(trials)}
    return [rows.trial for rows in trials if rows.trial in kept]


def cheapest(numbers: Sequence[int], costs: Mapping[int, float]) -> int:
    """Return the trial of `numbers` with the lowest cost; of equals, the first, so give the best trial first.

    Args:
        numbers: The best trial and those that cannot be told apart from it.
        costs: Cost of each trial by its number, such as its seconds of training.
    """
    return min(numbers, key=lambda number: costs[number])


def _require_same_rows(trials: Sequence[RowLosses]) -> None:
    """Check that there are trials, that each has a number of its own, and that all were scored on the same rows."""
    if not trials:
        raise ValueError("there is no trial to compare")
    if len({rows.trial for rows in trials}) < len(trials):
        raise ValueError(f"two trials have the same number: {[rows.trial for rows in trials]}")
    first = trials[0]
    for rows in trials[1:]:
        if not np.array_equal(rows.tokens, first.tokens):
            raise ValueError(f"trials {first.trial} and {rows.trial} were not scored on the same rows")


def _confidence_set(trials: Sequence[RowLosses], seed: int) -> set[int]:
    """Return the numbers of the trials in the model confidence set; the best trial is always one of them."""
    _require_same_rows(trials)
    if len(trials[0].sums) < FEWEST_ROWS:
        return {rows.trial for rows in trials}
    observed, resampled = _paired_statistics(trials, seed)
    kept = list(range(len(trials)))
    while len(kept) > 1:
        among = np.ix_(kept, kept)
        largest = observed[among].max()
        maxima = np.abs(resampled[among]).max(axis=(0, 1))  # (resamples,)
        if (1 + np.sum(maxima >= largest)) / (1 + RESAMPLES) > _LEVEL:
            break
        worst = int(np.argmax(observed[among].max(axis=1)))
        del kept[worst]
    return {trials[index].trial for index in kept}


def _paired_statistics(trials: Sequence[RowLosses], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the difference of each two trials in standard errors: observed, and centred on it in each resample.

    Returns:
        (trials, trials), positive where the first trial is worse than the second, and (trials, trials, resamples).
    """
    sums = np.stack([np.asarray(rows.sums, dtype=np.float64) for rows in trials], axis=1)  # (rows, trials)
    tokens = np.asarray(trials[0].tokens, dtype=np.float64)
    count, loss = len(tokens), sums.sum(axis=0) / tokens.sum()
    residuals = sums - tokens[:, None] * loss  # of the ratio of sums, so that the number of tokens is random too
    times = _times_drawn(count, seed)  # (resamples, rows)
    drawn, drawn_squares = times @ tokens, times @ tokens**2
    unbiased = count / (count - 1)
    rounding = _NO_SPREAD * np.abs(loss).max()
    observed = np.zeros((len(trials), len(trials)))
    resampled = np.zeros((len(trials), len(trials), RESAMPLES))
    for one in range(len(trials) - 1):
        others = np.arange(one + 1, len(trials))
        errors = residuals[:, [one]] - residuals[:, others]  # (rows, others)
        spread = np.sqrt(unbiased * (errors**2).sum(axis=0)) / tokens.sum()
        observed[one, others] = _in_standard_errors(loss[one] - loss[others], spread, rounding)
        shift = times @ errors / drawn[:, None]  # (resamples, others)
        squares = (
            times @ errors**2 - 2 * shift * (times @ (errors * tokens[:, None])) + shift**2 * drawn_squares[:, None]
        )
        spread = np.sqrt(unbiased * np.maximum(squares, 0)) / drawn[:, None]
        resampled[one, others] = _in_standard_errors(shift, spread, rounding).T
        observed[others, one], resampled[others, one] = -observed[one, others], -resampled[one, others]
    return observed, resampled


def _times_drawn(count: int, seed: int) -> np.ndarray:
    """Return how often each resample draws each row, float64 (resamples, count)."""
    draws = resampled_rows(count, seed)
    places = draws + count * np.arange(RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)


def _in_standard_errors(differences: np.ndarray, errors: np.ndarray, rounding: float) -> np.ndarray:
    """Return differences / errors; without spread, 0 if the difference is rounding, and infinite if it is not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = differences / np.where(errors > rounding, errors, 0.0)
    return np.where(np.abs(differences) > rounding, ratios, 0.0)
