"""What a run has to go through: its steps, its rows, and the largest of them, from the lengths of the data alone."""

from dataclasses import dataclass

import numpy as np

from minisft.recipe import Recipe, TrainingRecipe
from minisft.training.batching import Sizes, balance_ranks, fill_bins, steps_of_epoch

_STEPS_LOOKED_AT = 400  # of an epoch, spread over it; the rest are like them
_SHARE_SUPERVISED = 0.5  # of the tokens, where no data is known


@dataclass(frozen=True)
class Workload:
    """The work of a run, as the largest process has it.

    Attributes:
        steps: optimizer steps of the run; None where no data is known.
        checkpoints: that it writes.
        tokens: of a step, over all processes, as a mean.
        busiest_tokens: of a step, of the process with most, as a mean.
        busiest_supervised: Supervised tokens of that process.
        busiest_squares: Sum of the squares of its conversations' lengths.
        rows: forwards of a step, as a mean; all processes have the same number.
        most_rows: of a step.
        row_tokens: (rows,) tokens of each row that was looked at.
        row_supervised: (rows,) supervised tokens of it.
        longest: tokens of the longest conversation.
        heaviest_step: (conversations,) indexes of the step with the longest row.
    """

    steps: int | None
    checkpoints: int
    tokens: float
    busiest_tokens: float
    busiest_supervised: float
    busiest_squares: float
    rows: float
    most_rows: int
    row_tokens: np.ndarray
    row_supervised: np.ndarray
    longest: int
    heaviest_step: np.ndarray

    def __post_init__(self) -> None:
        assert self.row_tokens.shape == self.row_supervised.shape
        assert len(self.row_tokens) > 0

    def heaviest_row(self, per_token: float, per_supervised: float) -> tuple[int, int]:
        """Return tokens and supervised tokens of the row that needs most, at these bytes for each."""
        at = int(np.argmax(self.row_tokens * per_token + self.row_supervised * per_supervised))
        return int(self.row_tokens[at]), int(self.row_supervised[at])


def workload_of(sizes: Sizes, recipe: Recipe, *, row_tokens: int, processes: int) -> Workload:
    """Lay the first epoch out as training will (`training.batching`), and count.

    Args:
        sizes: tokens and supervised tokens of every training conversation.
        recipe: whose batches, seed and packing decide.
        row_tokens: tokens of a row at most.
        processes: over which a step is dealt.
    """
    training = recipe.training
    epoch = steps_of_epoch(
        sizes.tokens,
        global_batch=training.batch_size * training.gradient_accumulation * processes,
        pack_tokens=recipe.data.max_length if training.packing else None,
        seed=recipe.seed,
        epoch=0,
    )
    per_epoch = len(epoch)
    looked_at = epoch[:: max(1, per_epoch // _STEPS_LOOKED_AT)]
    steps = [_Step.of(sizes, conversations, row_tokens, processes) for conversations in looked_at]
    total = training.max_steps or max(1, int(np.ceil(training.epochs * per_epoch)))
    return Workload(
        steps=total,
        checkpoints=_checkpoints(training, total, per_epoch),
        tokens=float(np.mean([step.tokens for step in steps])),
        busiest_tokens=float(np.mean([step.busiest[0] for step in steps])),
        busiest_supervised=float(np.mean([step.busiest[1] for step in steps])),
        busiest_squares=float(np.mean([step.busiest[2] for step in steps])),
        rows=float(np.mean([step.rows for step in steps])),
        most_rows=max(step.rows for step in steps),
        row_tokens=np.concatenate([step.row_tokens for step in steps]),
        row_supervised=np.concatenate([step.row_supervised for step in steps]),
        longest=int(sizes.tokens.max()),
        heaviest_step=max(steps, key=lambda step: int(step.row_tokens.max())).conversations,
    )


def workload_assumed(training: TrainingRecipe, *, row_tokens: int, processes: int, length: int) -> Workload:
    """Where no data is known: conversations of half of `length`, and a full row, half of the tokens supervised."""
    mean = max(1, length // 2)
    tokens = training.batch_size * training.gradient_accumulation * mean
    rows = -(-tokens // row_tokens)
    longest = max(length, min(row_tokens, tokens))
    return Workload(
        steps=None, checkpoints=0, tokens=tokens * processes, busiest_tokens=tokens,
        busiest_supervised=tokens * _SHARE_SUPERVISED, busiest_squares=tokens * mean, rows=rows, most_rows=rows,
        row_tokens=np.array([longest]), row_supervised=np.array([round(longest * _SHARE_SUPERVISED)]), longest=length,
        heaviest_step=np.array([], dtype=np.int64),
    )  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """One step: its conversations, how many rows, its tokens, the busiest process's sums, and all rows' sizes."""

    conversations: np.ndarray
    rows: int
    tokens: int
    busiest: tuple[int, int, int]
    row_tokens: np.ndarray
    row_supervised: np.ndarray

    @classmethod
    def of(cls, sizes: Sizes, conversations: np.ndarray, row_tokens: int, processes: int) -> "_Step":
        tokens, supervised = sizes.tokens[conversations], sizes.supervised[conversations]
        shares = balance_ranks(tokens.tolist(), processes)
        busiest = max(shares, key=lambda share: int(tokens[share].sum()))
        filled = [
            [[share[at] for at in row] for row in fill_bins(tokens[share].tolist(), row_tokens)] for share in shares
        ]
        rows = [row for share in filled for row in share]
        return cls(
            conversations=conversations,
            rows=max(map(len, filled)),
            tokens=int(tokens.sum()),
            busiest=(
                int(tokens[busiest].sum()), int(supervised[busiest].sum()), int((tokens[busiest] ** 2).sum())
            ),
            row_tokens=np.array([tokens[row].sum() for row in rows]),
            row_supervised=np.array([supervised[row].sum() for row in rows]),
        )  # fmt: skip


def _checkpoints(training: TrainingRecipe, steps: int, per_epoch: int) -> int:
    every = per_epoch if training.save_every == "epoch" else training.save_every
    return -(-steps // every)
