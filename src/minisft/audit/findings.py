"""Rows that the losses of a run make suspicious: nothing is computed but from row_losses.bin and the prepared data.

Networks learn what most rows have in common first (Arpit et al. 2017, "A Closer Look at Memorization in Deep Networks",
arXiv 1706.05394), so that a mislabelled or damaged row still has a high loss when the others are learned. Losses fall
within an epoch too: the loss at the last visit is compared with those of the rows that were seen at the same time.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minisft.audit.step_rows import RowReport
from minisft.data.prepared import load_train
from minisft.row_losses import read_row_losses
from minisft.run_folder import RunFolder
from minisft.training.batching import IGNORED, measure_lengths

HARDEST = 10  # rows with the highest excess that are listed
MOST = 20  # rows of any other finding that are listed
_WINDOW = 64  # losses, in the order of the steps, of which each is compared with the median
# A row never falls if its last loss is above 0.95 of its first, where the median row fell below 0.9.
STAYS, FALLS = 0.95, 0.9
# A row is learned at once if its second loss is below a tenth of its first, or its first is below 0.05 nats a token,
# where the median row is not.
AT_ONCE, KNOWN = 0.1, 0.05


@dataclass(frozen=True)
class Contradiction:
    """Rows with the same first prompt and different first answers."""

    rows: tuple[RowReport, ...]


@dataclass(frozen=True)
class Findings:
    """What the losses of a run show about its data.

    Args:
        epochs: Number of times that every row was seen.
        hardest: The rows with the highest `excess`, highest first; `loss` is the last one.
        never_falls: Rows whose loss did not fall while the others' did; `loss` is the last one.
        learned_at_once: Rows whose loss was next to nothing at first or second sight; `loss` is the last one.
        contradictions: Groups of rows with the same prompt and different answers.
    """

    epochs: int
    hardest: tuple[RowReport, ...]
    never_falls: tuple[RowReport, ...]
    learned_at_once: tuple[RowReport, ...]
    contradictions: tuple[Contradiction, ...]

    def as_dict(self) -> dict[str, Any]:
        def listed(rows: Sequence[RowReport]) -> list[dict[str, Any]]:
            return [row.as_dict() for row in rows]

        return {
            "step": None,
            "replayed": False,
            "loss": None,
            "rows": listed(self.hardest),
            "epochs": self.epochs,
            "never_falls": listed(self.never_falls),
            "learned_at_once": listed(self.learned_at_once),
            "contradictions": [listed(group.rows) for group in self.contradictions],
        }


def find_suspicious_rows(output: Path) -> Findings:
    """Find suspicious rows of a run.

    Raises:
        UserError: The run has no losses of its rows, or no data.
    """
    data = load_train(output)
    records = read_row_losses(RunFolder(output).row_losses)
    losses = losses_by_epoch(records, len(data))
    excess = latest(losses_by_epoch(excess_losses(records), len(data)))
    supervised = measure_lengths(data).supervised
    seen = ~np.isnan(losses)
    complete = int(seen.sum(axis=1).min()) if len(losses) else 0

    def report(numbers: np.ndarray) -> tuple[RowReport, ...]:
        found = data.select_columns(["id", "location"])
        return tuple(
            RowReport(
                number,
                found[number]["id"],
                found[number]["location"],
                int(supervised[number]),
                None if np.isnan(last[number]) else float(last[number]),
                None,
                excess=None if np.isnan(excess[number]) else float(excess[number]),
            )
            for number in numbers.tolist()
        )

    last = latest(losses)
    hardest = np.argsort(-np.nan_to_num(excess, nan=-np.inf, posinf=np.inf), kind="stable")[:HARDEST]
    return Findings(
        complete,
        report(hardest),
        report(never_falling(losses)[:MOST]),
        report(learned_at_once(losses)[:MOST]),
        tuple(Contradiction(report(np.asarray(rows))) for rows in contradictory_rows(data)[:MOST]),
    )


def losses_by_epoch(records: np.ndarray, rows: int) -> np.ndarray:
    """Return the losses of each row in the order in which it was seen, (rows, epochs); NaN where it was not seen yet.

    A loss that is not finite becomes infinite.
    """
    order = np.argsort(records["row"], kind="stable")
    row, loss = records["row"][order].astype(np.int64), records["loss"][order].astype(float)
    counts = np.bincount(row, minlength=rows)
    visit = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.full((rows, int(counts.max(initial=0))), np.nan)
    found[row, visit] = np.where(np.isfinite(loss), loss, np.inf)
    return found


def excess_losses(records: np.ndarray) -> np.ndarray:
    """Return the records with each loss minus the median of its window; infinite where a loss was not finite."""
    loss = np.where(np.isfinite(records["loss"]), records["loss"].astype(float), np.inf)
    for part in np.array_split(np.arange(len(loss)), max(1, len(loss) // _WINDOW)):
        finite = loss[part][np.isfinite(loss[part])]
        loss[part] -= np.median(finite) if len(finite) else 0.0
    found = records.copy()
    found["loss"] = loss
    return found


def latest(losses: np.ndarray) -> np.ndarray:
    """Return the last loss of each row, (rows,); NaN for a row that was not seen."""
    if losses.shape[1] == 0:
        return np.full(len(losses), np.nan)
    seen = (~np.isnan(losses)).sum(axis=1)
    last: np.ndarray = losses[np.arange(len(losses)), np.maximum(seen - 1, 0)]
    return last


def never_falling(losses: np.ndarray) -> np.ndarray:
    """Return the rows whose loss did not fall, the highest first; none where the median row did not fall either."""
    if losses.shape[1] < 2:
        return np.zeros(0, dtype=np.int64)
    first, last = losses[:, 0], latest(losses)
    twice = ~np.isnan(losses[:, 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(twice, last / first, np.nan)
    if not twice.any() or np.nanmedian(ratio) > FALLS:
        return np.zeros(0, dtype=np.int64)
    found = np.flatnonzero(twice & ~(ratio <= STAYS))
    return found[np.argsort(-last[found], kind="stable")]


def learned_at_once(losses: np.ndarray) -> np.ndarray:
    """Return the rows whose loss was next to nothing at first or second sight; none where that holds for the median."""
    if losses.shape[1] == 0:
        return np.zeros(0, dtype=np.int64)
    first = losses[:, 0]
    known = first <= KNOWN
    if losses.shape[1] > 1:
        known |= losses[:, 1] <= AT_ONCE * first
    found = np.flatnonzero(known)
    if 2 * len(found) > len(losses):
        return np.zeros(0, dtype=np.int64)
    return found[np.argsort(first[found], kind="stable")]


def contradictory_rows(data: Any) -> list[list[int]]:
    """Return groups of rows whose tokens are the same up to the first answer, and whose first answers differ."""
    answers: dict[bytes, dict[bytes, list[int]]] = {}
    numbers = data.with_format("numpy", columns=["input_ids", "labels"])
    for number in range(len(data)):
        row = numbers[number]
        ids, learned = row["input_ids"], row["labels"] != IGNORED
        start = int(learned.argmax())
        length = int((~learned[start:]).argmax()) or len(ids) - start
        prompt, answer = ids[:start].tobytes(), ids[start : start + length].tobytes()
        answers.setdefault(prompt, {}).setdefault(answer, []).append(number)
    return [sorted(itertools.chain.from_iterable(group.values())) for group in answers.values() if len(group) > 1]
