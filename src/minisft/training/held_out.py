"""The loss on the held-out rows while training goes on, and stopping early when it or a score no longer improves."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minisft.training.batching import PackedRow, RowDataset, StepSampler, measure_lengths

EVAL_LOSS = "eval_loss"  # in metrics.jsonl, the Trainer's log history and the trackers


class HeldOutRows:
    """The held-out conversations of one process, packed in rows as a training step packs them.

    Args:
        dataset: Dataset with the columns input_ids and labels.
        row_tokens: Maximum number of tokens of a forward.
        processes: Number of processes that share the rows; each runs the same number of forwards.
        rank: Rank of this process.
    """

    def __init__(self, dataset: Any, *, row_tokens: int, processes: int, rank: int) -> None:
        sizes = measure_lengths(dataset)
        self._sampler = StepSampler(
            sizes, global_batch=len(sizes), row_tokens=row_tokens, processes=processes, rank=rank, seed=0
        )
        self._plans = self._sampler.plan(np.arange(len(sizes)))
        self._rows = RowDataset(dataset)
        self.supervised = int(sizes.supervised.sum())  # of all processes

    def separate_rows(self) -> None:
        """Give each conversation its own row, for a model that is wrong for rows of several."""
        self._sampler.row_tokens = 1
        self._plans = self._sampler.plan(np.arange(len(self._sampler.sizes)))

    @torch.no_grad()
    def sum_of_losses(self, model: Any, loss_of: Callable[[Any, PackedRow], torch.Tensor]) -> torch.Tensor:
        """Return the summed loss of this process's supervised tokens, () in fp64; the model is left in eval mode.

        Args:
            model: Model of this process, or its shard of one.
            loss_of: Returns the sum of the losses of a row under a model.
        """
        model.eval()
        total = torch.zeros((), dtype=torch.float64)
        for plan in self._plans:
            row, _ = self._rows[plan]
            total += loss_of(model, row).double().cpu()
        return total


def is_due(step: int, *, every: str | int | None, epoch_steps: int, last: int) -> bool:
    """Return whether the held-out loss is computed after a step; after the last step always, if at all."""
    if every is None:
        return False
    return step == last or step % (epoch_steps if every == "epoch" else int(every)) == 0


@dataclass(frozen=True)
class EarlyStopping:
    """What ends a run before its last step: `patience` evaluations without a better one.

    It depends only on the log history, which all processes share and every checkpoint stores, so that all of them stop
    at the same step, resumed or not.

    Args:
        patience: Number of evaluations.
        key: Key of an evaluation's value in the Trainer's log history.
        higher_is_better: Whether a higher value is better.
    """

    patience: int
    key: str = EVAL_LOSS
    higher_is_better: bool = False

    def ends(self, log_history: Iterable[dict[str, Any]]) -> bool:
        """Return whether the run ends with the newest evaluation of a Trainer's log history."""
        sign = -1 if self.higher_is_better else 1
        return stops_early([sign * entry[self.key] for entry in log_history if self.key in entry], self.patience)

    def __str__(self) -> str:
        better = "higher" if self.higher_is_better else "lower"
        what = "held-out loss" if self.key == EVAL_LOSS else self.key.removeprefix("eval_")
        return f"{self.patience} evaluation{'s' if self.patience > 1 else ''} without a {better} {what}"


def stops_early(losses: Sequence[float], patience: int) -> bool:
    """Return whether the lowest of some losses is `patience` evaluations old."""
    if not losses:
        return False
    ordered = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return len(losses) - 1 - ordered.index(min(ordered)) >= patience
