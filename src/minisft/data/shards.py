"""Sources to encoded shards (Arrow files), and shards to the train and test splits."""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minisft.data.encoder import Encoder
from minisft.data.formats import FORMATS, detect_format, not_json_error
from minisft.data.pipeline import ChunkTask, process_chunks, schema
from minisft.data.readers import CellsError, Chunk, limit_rows
from minisft.data.sources import Source, read_source
from minisft.data.stats import DatasetStats, SplitPart
from minisft.errors import UserError
from minisft.recipe import DataRecipe, Recipe

if TYPE_CHECKING:
    import pyarrow as pa


Progress = Callable[[int], None]
_DETECTED_IN = 4  # chunks of a source, at most


@dataclass(frozen=True)
class EncodedShard:
    """Encoded rows in an Arrow file, with the split key and the identity of each conversation.

    Args:
        path: Path of the Arrow file.
        keys: Split keys, uint64, one per conversation.
        identities: Hashes of the conversations, uint64, one per conversation.
        rows: Numbers of rows, int32, one per conversation.
        lengths: Tokens, int32, one per row.
        formats: The format of each source, by its path.
    """

    path: Path
    keys: np.ndarray
    identities: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    formats: dict[str, str]


def encode_sources(
    path: Path,
    sources: Sequence[Source],
    recipe: Recipe,
    encoder: Encoder,
    stats: DatasetStats,
    progress: Progress | None = None,
    sets: Sequence[str] = (),
) -> EncodedShard:
    """Encode all rows of the sources into one Arrow file, in their order.

    Args:
        path: Path of the Arrow file to write.
        sources: The sources, whose rows are read one after the other.
        recipe: The recipe, for its data part and its seed.
        encoder: The encoder, in the recipe's template.
        stats: The counts, to which this function adds.
        progress: Called with the number of rows read so far.
        sets: The test set of each source; `data.limit` then limits each set.

    Raises:
        UserError: A source cannot be read, or its format is unknown.
    """
    import pyarrow as pa

    streams = [read_source(source, index, recipe.data_seed) for index, source in enumerate(sources)]
    chunks, detected = with_formats(streams, sources, recipe.data)
    task = ChunkTask(recipe.data, tuple(detected), recipe.data_seed)
    kinds = (np.uint64, np.uint64, np.int32, np.int32)
    columns: list[list[np.ndarray]] = [[np.zeros(0, kind)] for kind in kinds]
    place, conversations = schema().get_field_index("conversation"), 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema()) as writer:
        groups = groupby(chunks, key=lambda chunk: sets[chunk.source] if sets else "")
        limited = chain.from_iterable(limit_rows(group, recipe.data.limit) for _, group in groups)
        for result in process_chunks(limited, encoder, task):
            batch = pa.ipc.read_record_batch(pa.py_buffer(result.table), schema())
            numbers = pa.array(batch.column(place).to_numpy() + np.int32(conversations))  # the chunk counts from 0
            writer.write_batch(batch.set_column(place, schema().field(place), numbers))
            conversations += len(result.keys)
            parts = (result.keys, result.identities, result.rows, result.lengths)
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
            stats.merge(result.stats)
            if progress is not None:
                progress(stats.count("rows", "read"))
    formats = {source.path: name for source, name in zip(sources, detected, strict=True)}
    keys, identities, rows, lengths = (np.concatenate(column) for column in columns)
    return EncodedShard(path, keys, identities, rows, lengths, formats)


def with_formats(
    streams: Sequence[Iterator[Chunk]], sources: Sequence[Source], data: DataRecipe
) -> tuple[Iterator[Chunk], list[str]]:
    """Return all chunks in order, and the format of each source, stated or detected from its first rows.

    Raises:
        UserError: A source cannot be read, or none of its first rows has a known format.
    """
    formats: list[str] = []
    opened: list[Iterable[Chunk]] = []
    for stream, source in zip(streams, sources, strict=True):
        if data.format != "auto":
            formats.append(data.format)
            opened.append(stream)
            continue
        read: list[Chunk] = []
        name, looked_at = None, 0
        for chunk in stream:
            read.append(chunk)
            name = next(filter(None, (detect_format(row) for _, row in chunk.parsed())), None)
            looked_at += len(chunk) > 0  # a small weight may leave out all rows of a chunk
            if name is not None or looked_at == _DETECTED_IN:
                break
        formats.append(name or _unknown_format(source, read))
        opened.append(chain(read, stream))
    return chain.from_iterable(opened), formats


def _unknown_format(source: Source, read: Sequence[Chunk]) -> str:
    """Refuse a source none of whose first rows has a known format."""
    if left_out := sum(chunk.left_out for chunk in read if not any(map(len, read))):
        problem = f"the weight {source.weight:g} leaves out every row, of {left_out:,}"
        raise UserError(source.path, problem, "raise the source's weight, or give more rows")
    location, row = next(((loc, row) for chunk in read for loc, row in chunk.parsed()), (source.path, None))
    if isinstance(row, ValueError):
        error = not_json_error(row)
        fix = "give UTF-8 text with one JSON object a line, or a JSON list"
        raise UserError(location, error.problem, error.fix if isinstance(row, CellsError) else fix)
    keys = f"its first row has the keys {', '.join(map(str, list(row)[:8]))}" if isinstance(row, dict) else (
        "its first row is not an object"
    )  # fmt: skip
    raise UserError(
        location,
        f"the format is unknown: {keys}",
        "bring the rows into one of the formats: `conversations` (ShareGPT), `messages`, `instruction`/`output` "
        f"(Alpaca), `prompt`/`completion`; data.format: {', '.join(FORMATS)}",
    )


_TEST_COLUMNS = ("messages", "tools")
_UNROLLED_COLUMNS = ("conversation", "answer")


def column_names(split: str, unrolled: bool) -> list[str]:
    """Return the columns of a split; see `schema`. `unrolled`: whether a conversation has several rows."""
    left_out = {*(_TEST_COLUMNS if split == "train" else ()), *(() if unrolled else _UNROLLED_COLUMNS)}
    return [name for name in schema().names if name not in left_out]


@dataclass(frozen=True)
class Split:
    """The rows of an encoded shard that belong to one split.

    Args:
        shard: The shard.
        mask: For each conversation, whether it belongs to the split; all its rows do.
    """

    shard: EncodedShard
    mask: np.ndarray

    @cached_property
    def row_mask(self) -> np.ndarray:
        return np.repeat(self.mask, self.shard.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row of the split."""
        return self.shard.lengths[self.row_mask]

    @property
    def conversations(self) -> int:
        return int(self.mask.sum())

    def batches(self, names: Sequence[str]) -> Iterator["pa.RecordBatch"]:
        """Yield the named columns of the split's rows, batch by batch."""
        import pyarrow as pa

        start = 0
        with pa.OSFile(str(self.shard.path)) as file:  # mapped, its pages would count as this process's memory
            for batch in pa.ipc.open_stream(file):
                chosen = self.row_mask[start : start + batch.num_rows]
                start += batch.num_rows
                if chosen.any():
                    columns = batch.select(names)
                    yield columns if chosen.all() else columns.filter(pa.array(chosen))

    def parts(self) -> Iterator[SplitPart]:
        """Yield (ids, labels, offsets) of the split's rows, batch by batch."""
        for batch in self.batches(("input_ids", "labels")):
            ids, labels = batch.column("input_ids"), batch.column("labels")
            offsets = ids.offsets.to_numpy()
            yield ids.flatten().to_numpy(), labels.flatten().to_numpy(), offsets - offsets[0]


def write_split(folder: Path, split: Split, names: Sequence[str], sets: Sequence[str] = ()) -> None:
    """Write the named columns of a split as a `datasets` folder, batch by batch.

    `datasets` writes a folder without rows, whose data file is then replaced: `datasets` would map all rows into
    memory to copy them.

    Args:
        folder: The folder.
        split: The split.
        names: The columns.
        sets: The test set of each source, for the column `test_set`; () writes no such column.
    """
    import datasets
    import pyarrow as pa

    # 1. A folder without rows.
    columns = pa.schema([*(schema().field(name) for name in names), *([("test_set", pa.string())] if sets else [])])
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        features = datasets.Features.from_arrow_schema(columns)
        empty = datasets.Dataset.from_dict({name: [] for name in columns.names}, features=features)
        empty.save_to_disk(str(folder), num_shards=1)
    finally:
        if bars:
            datasets.enable_progress_bars()
    # 2. A fingerprint of its own: that of no rows would be the same for all data, and `datasets` caches by it.
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["_fingerprint"] = secrets.token_hex(8)
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    # 3. The rows.
    data = folder / str(state["_data_files"][0]["filename"])
    with pa.OSFile(str(data), "wb") as file, pa.ipc.new_stream(file, columns) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([], columns))  # a file without any batch is not loaded
        for batch in split.batches(names):
            if sets:
                of_rows = [sets[source] for source in batch.column("source").to_pylist()]
                batch = pa.RecordBatch.from_arrays([*batch.columns, pa.array(of_rows, pa.string())], schema=columns)
            writer.write_batch(batch)


def count_sets(split: Split, sets: Sequence[str]) -> dict[str, int]:
    """Return the number of conversations of each test set.

    Args:
        split: The test split.
        sets: The test set of each source.

    Raises:
        UserError: A set has none.
    """
    counts = dict.fromkeys(sets, 0)
    sources = [source for batch in split.batches(("source",)) for source in batch.column("source").to_pylist()]
    firsts = np.cumsum([0, *split.shard.rows[split.mask]])[:-1]  # the first row of each conversation
    for start in firsts.tolist() if sets else ():
        counts[sets[sources[start]]] += 1
    for name, count in counts.items():
        if not count:
            problem = "no row of this test set can be used"
            raise UserError(f"data.test.{name}", problem, "give it usable rows, or leave the set out")
    return counts
