"""Bootstrap resamples of held-out rows, and the 95 % interval that they give (Efron 1979; Koehn 2004 for BLEU)."""

import numpy as np

# sacrebleu's defaults: its `--confidence` draws the same resamples.
RESAMPLES = 1000
SEED = 12345


def resampled_rows(count: int, seed: int = SEED) -> np.ndarray:
    """Return the row numbers of seeded resamples, (1000, count): the same rows for every system with `count` rows."""
    return np.random.default_rng(seed).choice(count, size=(RESAMPLES, count), replace=True)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds between which 95 % of the resamples' values, (resamples,), lie."""
    ordered = np.sort(values)
    tail = len(ordered) // 40  # 2.5 % of the resamples on each side
    return float(ordered[tail]), float(ordered[-tail - 1])
