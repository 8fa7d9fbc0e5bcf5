"""The loss of each source of the training data, from the losses of the rows of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisft.training.step_row_losses import StepRowLosses


@dataclass
class SourceLosses:
    """The summed loss and the supervised tokens of each source in the newest step.

    Args:
        names: Names of the sources.
        of_row: (rows of the data set,) number of the source of each row.
        supervised: (rows of the data set,) number of supervised tokens of each row.

    Attributes:
        logged: The entry `sources` of the last logged step in metrics.jsonl.
    """

    names: Sequence[str]
    of_row: np.ndarray
    supervised: np.ndarray
    logged: dict[str, dict[str, float]] = field(default_factory=dict)

    def log(self, step: StepRowLosses) -> dict[str, float]:
        """Add up a step; return the mean loss of each source, for trackers."""
        source = self.of_row[step.rows]
        sums = np.bincount(source, weights=step.sums, minlength=len(self.names))
        tokens = np.bincount(source, weights=self.supervised[step.rows], minlength=len(self.names))
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


def sources_of(dataset: Any, ledger: dict[str, Any] | None, supervised: np.ndarray) -> SourceLosses | None:
    """Return the losses by source of a train split; None for data that an earlier version prepared without sources."""
    names = (ledger or {}).get("source_names", {}).get("train")
    if names is None or "source" not in dataset.column_names:
        return None
    return SourceLosses(names, np.asarray(dataset.with_format("numpy")["source"][:], dtype=np.int64), supervised)
