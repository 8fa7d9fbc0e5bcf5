"""Which trials of a search are worse than the best one, and which cannot be told apart from it.

All trials are scored on the same held-out rows, so two trials are compared by their differences row by row: the rows
that are hard for both cancel out (paired bootstrap).

The best trial is chosen by looking at all of them, and so are the trials that stop at a rung. The comparison therefore
covers every pair of the trials that reached the rung, not only the pairs that are reported: the largest difference of
any two, in standard errors, is compared with the distribution of that maximum under the hypothesis that all trials are
equal. Pairs beyond its quantile differ; the others are tested again without them (step-down maximum test: Romano and
Wolf 2005, "Stepwise Multiple Testing as Formalized Data Snooping", Econometrica 73, 1237-1282). With the probability
of the level, asymptotically, no two equal trials are told apart, whichever of them is reported and however many there
are.

A search tests at several moments, and `ERROR_RATE` is shared among all of them (Bonferroni), so that with a probability
of 95 % no trial that is as good as the best is called worse, by the verdict or when it is stopped early:

- half of it belongs to the verdict, in equal parts to the rungs at which trials are compared: `VERDICT_LEVEL`;
- the other half belongs to early stops, and is spent on one bracket after the other: `stop_level`. The number of
  brackets is not known in advance, since a search can go on with a larger budget (alpha spending: Foster and Stine
  2008, "Alpha-investing", Journal of the Royal Statistical Society B 70, 429-444, without its returns).

The distribution comes from a studentised bootstrap: each resample is divided by its own standard error (Efron 1979;
Hall 1988, "Theoretical Comparison of Bootstrap Confidence Intervals"), which keeps the level with few rows too. Four
rows or fewer tell no trials apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minisft.evaluation.resampling import RESAMPLES, percentile_interval, resampled_rows
from minisft.search.budget import RUNGS

ERROR_RATE = 0.05  # the largest probability that a search calls a trial worse that is as good as the best
VERDICT_LEVEL = ERROR_RATE / 2 / len(RUNGS)  # of the verdict at one rung
FEWEST_ROWS = 5  # with fewer, more than 1 % of the resamples hold one row only, and have no standard error
_NO_SPREAD = 1e-12  # a standard error below this share of the loss is rounding


@dataclass(frozen=True)
class RowLosses:
    """Held-out losses of one trial at one rung: the objective is the mean loss of a supervised token.

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

    higher_is_better = False

    @property
    def loss(self) -> float:
        """Mean loss per supervised token, in nats."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def value(self) -> float:
        return self.loss

    def __len__(self) -> int:
        return len(self.sums)


@dataclass(frozen=True)
class RowMeans:
    """A number for each held-out answer of one trial at one rung: the objective is their mean.

    Args:
        trial: Number of the trial.
        sums: float64 (answers,): the numbers, in the same order for all trials.
        higher_is_better: Whether a higher mean is better.
    """

    trial: int
    sums: np.ndarray
    higher_is_better: bool

    @property
    def tokens(self) -> np.ndarray:
        """The weight of each answer, (answers,): one."""
        return np.ones(len(self.sums), dtype=np.int64)

    @property
    def value(self) -> float:
        return float(self.sums.mean())

    def __len__(self) -> int:
        return len(self.sums)


@dataclass(frozen=True)
class CorpusScores:
    """A corpus metric of the held-out answers of one trial at one rung, such as BLEU, which is no mean over answers.

    Args:
        trial: Number of the trial.
        value: The score.
        resamples: float64 (resamples,): the score of each resample; the resamples draw the same answers for all trials.
        answers: Number of answers.
        higher_is_better: Whether a higher score is better.
    """

    trial: int
    value: float
    resamples: np.ndarray
    answers: int
    higher_is_better: bool = True

    def __len__(self) -> int:
        return self.answers


TrialScores = RowLosses | RowMeans | CorpusScores


def cost(scores: TrialScores) -> float:
    """Return the objective with the sign that makes the lowest one the best."""
    return -scores.value if scores.higher_is_better else scores.value


@dataclass(frozen=True)
class Estimate:
    """A held-out loss in nats per supervised token, or another objective, and its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(rows: TrialScores, seed: int = 0) -> Estimate:
    """Return the objective, with a 95 % percentile bootstrap interval over rows.

    With few rows the interval is too narrow; `minisft.results.MIN_CONVERSATIONS` is the fewest that support one. The
    interval is that of one trial alone: two trials whose intervals overlap may still differ on the same rows.

    Args:
        rows: Losses or scores of one trial.
        seed: Seed of the resamples; those of a corpus metric are drawn already.
    """
    if isinstance(rows, CorpusScores):
        return Estimate(rows.value, *percentile_interval(rows.resamples))
    draws = resampled_rows(len(rows), seed)
    low, high = percentile_interval(rows.sums[draws].sum(axis=1) / rows.tokens[draws].sum(axis=1))
    return Estimate(rows.value, low, high)


def best_trial(trials: Sequence[TrialScores]) -> int:
    """Return the number of the trial with the lowest loss; of equals, the first.

    Raises:
        ValueError: There is no trial, or the trials were not scored on the same rows.
    """
    _require_same_rows(trials)
    return min(trials, key=cost).trial


def stop_level(bracket: int) -> float:
    """Return the level at which trials of a bracket, numbered from 0, are stopped early.

    The levels of all brackets add up to half of `ERROR_RATE`. A bracket tests twice, but a trial is stopped only if it
    is worse at two rungs in a row, and the rung at 1/4 is one of the two each time: one level is enough.
    """
    return ERROR_RATE / 2 / ((bracket + 1) * (bracket + 2))


def clearly_worse(
    trials: Sequence[TrialScores], seed: int = 0, *, than: int | None = None, level: float = VERDICT_LEVEL
) -> list[int]:
    """Return the numbers of the trials that are worse than another one by more than chance, in the order given.

    Args:
        trials: Losses or scores on the same rows of all trials among which the compared ones were chosen.
        seed: Seed of the resamples.
        than: Number of the trial to compare with; None: the best one of `trials`.
        level: The largest probability that any two equal trials are told apart.

    Raises:
        ValueError: There is no trial, or the trials were not scored on the same rows.
    """
    worse = _differences(trials, seed, level)
    numbers = [rows.trial for rows in trials]
    other = numbers.index(best_trial(trials) if than is None else than)
    return [number for place, number in enumerate(numbers) if worse[place, other]]


def indistinguishable(trials: Sequence[TrialScores], seed: int = 0) -> list[int]:
    """Return the numbers of the trials that cannot be told apart from the best one, without it.

    Args:
        trials: Losses or scores of all trials on the same rows.
        seed: Seed of the resamples.

    Raises:
        ValueError: There is no trial, or the trials were not scored on the same rows.
    """
    distinct = {best_trial(trials), *clearly_worse(trials, seed)}
    return [rows.trial for rows in trials if rows.trial not in distinct]


def cheapest(numbers: Sequence[int], costs: Mapping[int, float]) -> int:
    """Return the trial of `numbers` with the lowest cost; of equals, the first, so give the best trial first.

    Args:
        numbers: The best trial and those that cannot be told apart from it.
        costs: Cost of each trial by its number, such as its seconds of training.
    """
    return min(numbers, key=lambda number: costs[number])


def _require_same_rows(trials: Sequence[TrialScores]) -> None:
    """Check that there are trials, that each has a number of its own, and that all were scored on the same rows."""
    if not trials:
        raise ValueError("there is no trial to compare")
    if len({rows.trial for rows in trials}) < len(trials):
        raise ValueError(f"two trials have the same number: {[rows.trial for rows in trials]}")
    first = trials[0]
    for rows in trials[1:]:
        same = len(rows) == len(first) and type(rows) is type(first)
        if same and isinstance(rows, RowLosses) and isinstance(first, RowLosses):
            same = np.array_equal(rows.tokens, first.tokens)
        if not same:
            raise ValueError(f"trials {first.trial} and {rows.trial} were not scored on the same rows")


def _differences(trials: Sequence[TrialScores], seed: int, level: float) -> np.ndarray:
    """Return which trial (first axis) is worse than which other one by more than chance: bool (trials, trials)."""
    _require_same_rows(trials)
    worse = np.zeros((len(trials), len(trials)), dtype=bool)
    if len(trials[0]) < FEWEST_ROWS or len(trials) < 2:
        return worse
    first, second = np.triu_indices(len(trials), 1)
    ratios = [rows for rows in trials if not isinstance(rows, CorpusScores)]
    corpora = [rows for rows in trials if isinstance(rows, CorpusScores)]
    if corpora:
        observed, resampled = _paired_corpus_statistics(corpora, first, second)
    else:
        observed, resampled = _paired_statistics(ratios, first, second, seed)
    if trials[0].higher_is_better:
        observed = -observed
    equal = np.ones(len(observed), dtype=bool)  # pairs that are not told apart
    while equal.any():
        maxima = np.sort(np.abs(resampled[equal]).max(axis=0))
        beyond = RESAMPLES - np.searchsorted(maxima, np.abs(observed))  # resamples whose maximum is at least as large
        found = equal & ((1 + beyond) / (1 + RESAMPLES) <= level)
        if not found.any():
            break
        equal &= ~found
    worse[first, second], worse[second, first] = ~equal & (observed > 0), ~equal & (observed < 0)
    return worse


def _paired_corpus_statistics(
    trials: Sequence[CorpusScores], first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `_paired_statistics` returns, for a corpus metric, whose differences are no sums over rows.

    The standard error of a difference is its standard deviation over the resamples, which are centred on their mean as
    in `minisft.evaluation.metrics.p_value` (Koehn 2004).
    """
    values = np.array([rows.value for rows in trials])
    resamples = np.stack([rows.resamples for rows in trials])  # (trials, resamples)
    differences = resamples[first] - resamples[second]
    spread, rounding = differences.std(axis=1, ddof=1), _NO_SPREAD * max(1.0, np.abs(values).max())
    centred = differences - differences.mean(axis=1, keepdims=True)
    observed = _in_standard_errors(values[first] - values[second], spread, rounding)
    return observed, _in_standard_errors(centred, spread[:, None], rounding)


def _paired_statistics(
    trials: Sequence[RowLosses | RowMeans], first: np.ndarray, second: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the difference of each pair of trials in standard errors: observed, and centred on it in each resample.

    Args:
        trials: Losses or other row by row numbers of all trials.
        first: int (pairs,): place of one trial of each pair.
        second: int (pairs,): place of the other one.
        seed: Seed of the resamples.

    Returns:
        (pairs,), positive where the objective of the first trial is higher, and (pairs, resamples).
    """
    sums = np.stack([np.asarray(rows.sums, dtype=np.float64) for rows in trials], axis=1)  # (rows, trials)
    tokens = np.asarray(trials[0].tokens, dtype=np.float64)
    count, loss = len(tokens), sums.sum(axis=0) / tokens.sum()
    residuals = sums - tokens[:, None] * loss  # of the ratio of sums, so that the number of tokens is random too
    times = _times_drawn(count, seed)  # (resamples, rows)
    drawn, drawn_squares = (times @ tokens)[:, None], (times @ tokens**2)[:, None]
    unbiased = count / (count - 1)
    rounding = _NO_SPREAD * np.abs(loss).max()
    errors = residuals[:, first] - residuals[:, second]  # (rows, pairs)
    spread = np.sqrt(unbiased * (errors**2).sum(axis=0)) / tokens.sum()
    observed = _in_standard_errors(loss[first] - loss[second], spread, rounding)
    shift = times @ errors / drawn  # (resamples, pairs)
    squares = times @ errors**2 - 2 * shift * (times @ (errors * tokens[:, None])) + shift**2 * drawn_squares
    spread = np.sqrt(unbiased * np.maximum(squares, 0)) / drawn
    return observed, _in_standard_errors(shift, spread, rounding).T


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
