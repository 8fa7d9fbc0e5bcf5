"""The two sides of a split, from the staging file to `datasets` folders."""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minisft.data.chunks import schema
from minisft.data.overlap import Part
from minisft.data.staging import Staged

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN_COLUMNS = ("input_ids", "labels", "id", "location", "rendered", "findings")


@dataclass(frozen=True)
class Side:
    """The rows of a staging file that go to one side."""

    staged: Staged
    mask: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.staged.lengths[self.mask]

    def batches(self, names: Sequence[str]) -> Iterator["pa.RecordBatch"]:
        """The named columns of the side's rows, batch by batch."""
        import pyarrow as pa

        start = 0
        with pa.OSFile(str(self.staged.path)) as file:  # mapped, its pages would count as this process's memory
            for batch in pa.ipc.open_stream(file):
                chosen = self.mask[start : start + batch.num_rows]
                start += batch.num_rows
                if chosen.any():
                    columns = batch.select(names)
                    yield columns if chosen.all() else columns.filter(pa.array(chosen))

    def parts(self) -> Iterator[Part]:
        """(ids, labels, offsets) of the side's rows, batch by batch."""
        for batch in self.batches(("input_ids", "labels")):
            ids, labels = batch.column("input_ids"), batch.column("labels")
            offsets = ids.offsets.to_numpy()
            yield ids.flatten().to_numpy(), labels.flatten().to_numpy(), offsets - offsets[0]


def write_side(folder: Path, side: Side, names: Sequence[str]) -> None:
    """Write a side as a `datasets` folder, batch by batch.

    `datasets` writes the folder for no rows, and its data file is then written anew: it would map all rows into
    memory to copy them.
    """
    import pyarrow as pa

    kept = pa.schema([schema().field(name) for name in names])
    data = _write_empty(folder, kept)
    with pa.OSFile(str(data), "wb") as file, pa.ipc.new_stream(file, kept) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([], kept))  # a file without any batch is not loaded
        for batch in side.batches(names):
            writer.write_batch(batch)


def _write_empty(folder: Path, kept: "pa.Schema") -> Path:
    """Write a `datasets` folder without rows; the path of its data file."""
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        features = datasets.Features.from_arrow_schema(kept)
        empty = datasets.Dataset.from_dict({name: [] for name in kept.names}, features=features)
        empty.save_to_disk(str(folder), num_shards=1)
    finally:
        if bars:
            datasets.enable_progress_bars()
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["_fingerprint"] = secrets.token_hex(8)  # that of no rows would be the same for all data
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return folder / str(state["_data_files"][0]["filename"])
