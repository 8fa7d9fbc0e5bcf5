"""The loss of each source of the training data, from the losses of the step itself: nothing is computed twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from minisft.training.batching import PackedRow


@dataclass
class SourceLosses:
    """The summed loss and the supervised tokens of each source in the current step.

    Args:
        names: Names of the sources.
        of_row: (rows of the data set,) number of the source of each row.

    Attributes:
        logged: The entry `sources` of the last logged step in metrics.jsonl.
    """

    names: Sequence[str]
    of_row: np.ndarray
    logged: dict[str, dict[str, float]] = field(default_factory=dict)
    _sums: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    _tokens: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def start_step(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self._tokens = np.zeros(len(self.names), dtype=np.int64)

    def add(self, row: PackedRow, losses: torch.Tensor) -> None:
        """Add the losses of a row's supervised tokens.

        Args:
            row: The row, on the CPU.
            losses: (supervised,) the loss of each, on any device; no gradient is taken of it.
        """
        if not row.indexes:  # a row without conversations
            return
        conversation = np.searchsorted(np.cumsum(row.lengths), row.predict_at.numpy(), side="right")
        source, device = self.of_row[np.asarray(row.indexes)][conversation], self._sums.device
        numbers = torch.from_numpy(source)
        if device.type == "cuda":  # from pinned memory, so that the CPU does not wait for what the GPU still computes
            numbers = numbers.pin_memory()
        self._sums.index_add_(0, numbers.to(device, non_blocking=True), losses.detach().double())
        self._tokens += np.bincount(source, minlength=len(self.names))

    def log(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Add up the step over all processes; return the mean loss of each source, for trackers.

        Args:
            gather: Returns the tensors of all processes, concatenated in the first dimension.
        """
        tokens = torch.from_numpy(self._tokens).to(self._sums)
        sums, tokens = gather(torch.stack([self._sums, tokens])[None]).sum(0).cpu()
        self.logged = {
            name: {"loss_sum": float(loss), "supervised_tokens": int(count)}
            for name, loss, count in zip(self.names, sums, tokens, strict=True)
        }
        if len(self.names) < 2:
            return {}
        return {
            f"loss_by_source/{name}": one["loss_sum"] / one["supervised_tokens"]
            for name, one in self.logged.items()
            if one["supervised_tokens"]
        }


def sources_of(dataset: Any, ledger: dict[str, Any] | None) -> SourceLosses | None:
    """Return the losses by source of a train split; None for data that an earlier version prepared without sources."""
    names = (ledger or {}).get("source_names", {}).get("train")
    if names is None or "source" not in dataset.column_names:
        return None
    return SourceLosses(names, np.asarray(dataset.with_format("numpy")["source"][:], dtype=np.int64))
