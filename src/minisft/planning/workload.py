"""The work of a run: its steps, its rows and the largest row, computed from the lengths of the data alone."""

from dataclasses import dataclass, replace

import numpy as np

from minisft.recipe import Recipe, TrainingRecipe
from minisft.training.batching import Sizes, balance_ranks, fill_bins, steps_of_epoch

_SAMPLED_STEPS = 400  # steps of an epoch that are counted, at even distances; the others are assumed to be similar
_SHARE_SUPERVISED = 0.5  # share of the tokens that is supervised, where no data is known


@dataclass(frozen=True)
class Workload:
    """The work of a run. The busiest process of a step is the one with the most tokens.

    Attributes:
        steps: Optimizer steps of the run; None where no data is known.
        checkpoints: Number of checkpoints that the run writes.
        tokens: Mean tokens of a step, over all processes.
        busiest_tokens: Mean tokens of a step on its busiest process.
        busiest_supervised: Mean supervised tokens of that process.
        busiest_squares: Mean sum of the squared lengths of that process's conversations.
        rows: Mean rows (forwards) of a step; all processes have the same number.
        most_rows: Largest number of rows of a step.
        row_tokens: (rows,) Tokens of each row of the sampled steps.
        row_supervised: (rows,) Supervised tokens of each of these rows.
        longest: Tokens of the longest conversation.
        heaviest_step: (conversations,) Indexes of the conversations of the step with the longest row.
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

    def shared_by(self, processes: int) -> "Workload":
        """Return the work of a process where so many of them share the tokens of each row.

        The supervised tokens of a row may all be in one part of it.
        """
        if processes == 1:
            return self
        tokens = -(-self.row_tokens // processes)
        return replace(
            self,
            busiest_tokens=self.busiest_tokens / processes,
            busiest_supervised=self.busiest_supervised / processes,
            busiest_squares=self.busiest_squares / processes,
            row_tokens=tokens,
            row_supervised=np.minimum(self.row_supervised, tokens),
        )

    def heaviest_row(self, per_token: float, per_supervised: float) -> tuple[int, int]:
        """Return tokens and supervised tokens of the row that needs most bytes, at these bytes for each of them."""
        index = int(np.argmax(self.row_tokens * per_token + self.row_supervised * per_supervised))
        return int(self.row_tokens[index]), int(self.row_supervised[index])


def workload_of(sizes: Sizes, recipe: Recipe, *, row_tokens: int, processes: int) -> Workload:
    """Batch the first epoch as training will (`training.batching`), and count.

    Args:
        sizes: Tokens and supervised tokens of every training conversation.
        recipe: Recipe whose batch size, seed and packing decide on the batches.
        row_tokens: Largest number of tokens of a row.
        processes: Number of processes over which a step is distributed.
    """
    # 1. Count some steps of the first epoch.
    training = recipe.training
    epoch = steps_of_epoch(
        sizes.tokens,
        global_batch=training.batch_size * training.gradient_accumulation * processes,
        pack_tokens=recipe.data.max_length if training.packing else None,
        seed=recipe.seed,
        epoch=0,
    )
    per_epoch = len(epoch)
    sampled = epoch[:: max(1, per_epoch // _SAMPLED_STEPS)]
    steps = [_Step.of(sizes, conversations, row_tokens, processes) for conversations in sampled]
    # 2. Steps and checkpoints of the run.
    total = training.max_steps or max(1, int(np.ceil(training.epochs * per_epoch)))
    save_every = per_epoch if training.save_every == "epoch" else training.save_every
    return Workload(
        steps=total,
        checkpoints=-(-total // save_every),
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
    """Return the work that is assumed where no data is known.

    Conversations have half of `length`, the heaviest row is full, and half of the tokens are supervised.
    """
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
    """One step.

    Attributes:
        conversations: (conversations,) Indexes of its conversations.
        rows: Largest number of rows of a process.
        tokens: Tokens over all processes.
        busiest: Tokens, supervised tokens and sum of squared lengths of the process with the most tokens.
        row_tokens: (rows,) Tokens of each row of all processes.
        row_supervised: (rows,) Supervised tokens of each of these rows.
    """

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
        rows_of_shares = [
            [[share[index] for index in row] for row in fill_bins(tokens[share].tolist(), row_tokens)]
            for share in shares
        ]
        rows = [row for rows_of_share in rows_of_shares for row in rows_of_share]
        return cls(
            conversations=conversations,
            rows=max(map(len, rows_of_shares)),
            tokens=int(tokens.sum()),
            busiest=(
                int(tokens[busiest].sum()), int(supervised[busiest].sum()), int((tokens[busiest] ** 2).sum())
            ),
            row_tokens=np.array([tokens[row].sum() for row in rows]),
            row_supervised=np.array([supervised[row].sum() for row in rows]),
        )  # fmt: skip
