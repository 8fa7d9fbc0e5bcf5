"""The loss of each training row, from the losses of the step itself: nothing is computed twice.

The sums stay on the device during the step, so that no row waits for the one before it; they are copied once a step at
most, when it is logged. Loss by source adds up the same sums.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from minisft.training.batching import PackedRow

_MOST_STEPS = 100  # kept on the device, if fewer steps are logged


@dataclass(frozen=True)
class StepRowLosses:
    """The losses of all rows of one step, over all processes.

    Args:
        step: Number of the step, from 1.
        rows: (rows,) numbers of the rows in the data set.
        sums: (rows,) float64, the sum of the losses of each row's supervised tokens, in nats.
    """

    step: int
    rows: np.ndarray
    sums: np.ndarray

    def __post_init__(self) -> None:
        assert self.rows.shape == self.sums.shape


class RowLossBuffer:
    """Collects the losses of this process's rows, step by step, until `collect` adds them up over all processes."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, tuple[int, ...], torch.Tensor]] = []
        self._places: dict[int, int] = {}

    def start_step(self, step: int, rows: tuple[int, ...], device: torch.device) -> None:
        """Begin a step with the rows of all processes, the same in each of them."""
        self._places = {row: place for place, row in enumerate(rows)}
        self._steps.append((step, rows, torch.zeros(len(rows), dtype=torch.float64, device=device)))

    def add(self, row: PackedRow, losses: torch.Tensor) -> None:
        """Add the losses of the supervised tokens of one forward.

        Args:
            row: The row, on the CPU.
            losses: (supervised,) the loss of each, on any device; no gradient is taken of it.
        """
        if not row.indexes:  # a row without conversations
            return
        sums = self._steps[-1][2]
        conversation = np.searchsorted(np.cumsum(row.lengths), row.predict_at.numpy() + row.start, side="right")
        places = torch.from_numpy(np.asarray([self._places[index] for index in row.indexes])[conversation])
        if sums.device.type == "cuda":  # from pinned memory, so that the CPU does not wait for what the GPU computes
            places = places.pin_memory()
        sums.index_add_(0, places.to(sums.device, non_blocking=True), losses.detach().double())

    @property
    def is_full(self) -> bool:
        return len(self._steps) >= _MOST_STEPS

    def collect(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> list[StepRowLosses]:
        """Return the steps since the last call, and forget them; every process calls it after the same step.

        Args:
            gather: Returns the tensors of all processes, concatenated in the first dimension.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        own = torch.cat([sums for _, _, sums in steps])
        sums = np.array(gather(own[None]).sum(0).tolist())
        ends = np.cumsum([len(rows) for _, rows, _ in steps])[:-1]
        return [
            StepRowLosses(step, np.asarray(rows, dtype=np.int64), part)
            for (step, rows, _), part in zip(steps, np.split(sums, ends), strict=True)
        ]
