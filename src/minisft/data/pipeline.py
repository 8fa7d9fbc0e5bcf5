"""Chunks of source rows through all steps: parse, render, encode, truncate, verify; in one process or in several."""

import gc
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.data.conversation import Conversation, Message, calls_to_text
from minisft.data.encoder import Encoded, EncodedBatch, Encoder
from minisft.data.formats import (
    REPAIRS,
    RowError,
    check_order,
    ignored_columns,
    repair,
    repair_characters,
    row_too_large_error,
    to_conversation,
)
from minisft.data.readers import LARGEST_ROW, Chunk
from minisft.data.renderers.base import RefusedError, Rendered
from minisft.data.split import identity_key, prompt_key
from minisft.data.stats import DatasetStats, RowProblem
from minisft.data.truncation import truncate
from minisft.data.verification import verify
from minisft.processes import exit_with_parent
from minisft.recipe import DataRecipe

if TYPE_CHECKING:
    import pyarrow as pa


MESSAGE_FIELDS = ("role", "content", "supervised", "tool_calls", "name", "reasoning", "call_id")
LEFT_OUT_BY_WEIGHT = "left_out_by_weight"  # the ledger's name for rows that a source's weight below 1 leaves out
_CHARACTERS = ("nul_character", "lone_surrogate")


@dataclass(frozen=True)
class ChunkTask:
    """The settings by which the rows of a chunk are prepared.

    Args:
        data: The data part of the recipe.
        formats: The format of each source, by its index.
        seed: The seed of the split.
    """

    data: DataRecipe
    formats: tuple[str, ...]
    seed: int


@dataclass
class ChunkResult:
    """The prepared rows of a chunk.

    Args:
        table: An Arrow record batch with the kept rows, serialised.
        keys: The split key of each kept row, uint64.
        identities: A hash of the complete conversation of each kept row, uint64.
        lengths: The number of tokens of each kept row, int32.
        stats: The counts.
    """

    table: bytes
    keys: np.ndarray
    identities: np.ndarray
    lengths: np.ndarray
    stats: DatasetStats = field(default_factory=DatasetStats)


def process_chunk(chunk: Chunk, encoder: Encoder, task: ChunkTask) -> ChunkResult:
    """Parse, check, render, encode, truncate and verify the rows of a chunk."""
    stats = DatasetStats()
    was_on = gc.isenabled()
    gc.disable()  # rows hold no cycles, and the search for cycles among so many objects takes a tenth of the time
    try:
        # 1. Rows to conversations, and these to segments.
        conversations, rendered = _render_rows(chunk, encoder, task, stats)
        # 2. Segments to ids and labels.
        batch = encoder.encode_rendered(rendered, conversations)
        # 3. Truncate the rows that are too long.
        full_lengths = np.diff(batch.offsets)
        if (full_lengths > task.data.max_length).any():
            conversations, batch, full_lengths = _truncate_rows(conversations, batch, encoder, task, stats)
        # 4. Verify the rows as they are written.
        if task.data.verify and conversations:
            verify(encoder, conversations, batch)
        # 5. Make the table, and the keys for the split and for the count of duplicates.
        _count_kept(conversations, batch, stats)
        table, lengths = _flat_table(conversations, batch, full_lengths), np.diff(batch.offsets)
        keys = np.fromiter((prompt_key(c, task.seed) for c in conversations), np.uint64, len(conversations))
        identities = np.fromiter(map(identity_key, conversations), np.uint64, len(conversations))
        return ChunkResult(table.serialize().to_pybytes(), keys, identities, lengths.astype(np.int32), stats)
    finally:
        if was_on:
            gc.enable()


# --- rows to renderings -----------------------------------------------------------------------------------


def _render_rows(
    chunk: Chunk, encoder: Encoder, task: ChunkTask, stats: DatasetStats
) -> tuple[list[Conversation], list[Rendered]]:
    """Return the conversations of the rows with their renderings. Rows that cannot be used are counted in `stats`."""
    conversations, rendered = [], []
    format = task.formats[chunk.source]
    stats.add("rows", "read", len(chunk) + chunk.left_out)
    if chunk.left_out:
        stats.add("skipped", LEFT_OUT_BY_WEIGHT, chunk.left_out)
    for location, row in chunk.parsed():
        repairs: tuple[str, ...] = ()
        try:
            if task.data.invalid == "repair":
                conversation, repairs = _repaired(row, location, format)
            else:
                conversation = to_conversation(row, location, format)
                check_order(conversation.messages)
            if sum(len(message.content) for message in conversation.messages) > LARGEST_ROW:
                raise row_too_large_error()
            conversation = conversation.supervise(task.data.train_on)
            rendering = encoder.render(conversation)
            rendering.findings.extend(repairs)
        except RowError as error:
            repairable = True
            try:
                _repaired(row, location, format)
            except (RowError, RecursionError):
                repairable = False
            stats.skip(RowProblem(location, error.reason, error.problem, error.fix, repairable))
        except RecursionError:
            problem = "its values are nested too deeply"
            stats.skip(RowProblem(location, "nested_too_deeply", problem, "write plain texts"))
        except RefusedError as error:
            stats.skip(_refused(location, error))
        else:
            conversations.append(conversation)
            rendered.append(rendering)
            stats.add_ignored(ignored_columns(row, format))
    return conversations, rendered


def _repaired(row: Any, location: str, format: str) -> tuple[Conversation, tuple[str, ...]]:
    """Return the row's conversation in order, and the names of the repairs.

    Raises:
        RowError: The row cannot be repaired.
    """
    done: tuple[str, ...] = ()
    try:
        conversation = to_conversation(row, location, format)
    except RowError as error:
        if error.reason not in _CHARACTERS:
            raise
        conversation = to_conversation(repair_characters(row), location, format)
        done = ("characters_replaced",)
    try:
        check_order(conversation.messages)
    except RowError:
        messages, repairs = repair(conversation.messages)
        if not messages:
            raise
        check_order(messages)
        conversation, done = replace(conversation, messages=messages), (*done, *repairs)
    return conversation, done


def _refused(location: str, error: RefusedError) -> RowProblem:
    fix = "choose another data.template, or let `invalid: skip` leave the row out"
    return RowProblem(location, error.reason, error.problem, fix)


# --- rows that are too long -------------------------------------------------------------------------------


def _truncate_rows(
    conversations: Sequence[Conversation], batch: EncodedBatch, encoder: Encoder, task: ChunkTask, stats: DatasetStats
) -> tuple[list[Conversation], EncodedBatch, np.ndarray]:
    """Truncate the rows above `max_length`, and leave out those that cannot be truncated.

    Returns:
        The conversations that are kept, their tokens, and the number of tokens of each before truncation.
    """
    limit, overflow = task.data.max_length, task.data.overflow
    kept: list[tuple[Conversation, Encoded, int]] = []
    for row, conversation in enumerate(conversations):
        encoded = batch[row]
        full = len(encoded.input_ids)
        if full > limit:
            try:
                truncated = truncate(conversation, encoded, encoder.encode, limit, overflow)
            except RefusedError as error:  # the template takes the complete conversation, but not a shorter one
                stats.skip(_refused(conversation.location, error))
                continue
            if truncated.encoded is None:
                problem = f"no supervised answer begins within the first {limit:,} of {full:,} tokens"
                if truncated.reason == "too_long":
                    problem = f"{full:,} tokens, more than data.max_length {limit:,}"
                fix = "raise data.max_length, or choose another data.overflow"
                stats.skip(RowProblem(conversation.location, truncated.reason, problem, fix))
                continue
            cut = truncated.kind or "trailing"
            stats.add("overflow", cut)
            stats.add("tokens", "cut", full - len(truncated.encoded.input_ids))
            stats.add("turns", "dropped", len(conversation.messages) - len(truncated.conversation.messages))
            findings = tuple(dict.fromkeys([*truncated.encoded.findings, *encoded.findings, f"cut_{cut}"]))
            conversation, encoded = truncated.conversation, replace(truncated.encoded, findings=findings)
        kept.append((conversation, encoded, full))
    rows = [encoded for _, encoded, _ in kept]
    offsets = np.concatenate([[0], np.cumsum([len(row.input_ids) for row in rows], dtype=np.int64)])
    ids = np.fromiter((i for row in rows for i in row.input_ids), np.int32, int(offsets[-1]))
    labels = np.fromiter((i for row in rows for i in row.labels), np.int32, int(offsets[-1]))
    kept_batch = EncodedBatch(ids, labels, offsets, [row.answers for row in rows], [row.findings for row in rows])
    return [row[0] for row in kept], kept_batch, np.array([full for _, _, full in kept], dtype=np.int64)


# --- the table --------------------------------------------------------------------------------------------


def _flat_table(conversations: Sequence[Conversation], batch: EncodedBatch, rendered: np.ndarray) -> "pa.RecordBatch":
    """Return the rows as an Arrow record batch; `rendered` is the number of tokens of each before truncation."""
    import pyarrow as pa

    offsets = pa.array(batch.offsets.astype(np.int32))
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, pa.array(batch.ids)),
            pa.ListArray.from_arrays(offsets, pa.array(batch.labels)),
            pa.array([c.id for c in conversations], pa.string()),
            pa.array([c.location for c in conversations], pa.string()),
            pa.array(rendered.astype(np.int32)),
            pa.array([",".join(findings) for findings in batch.findings], pa.string()),
            _messages_array([c.messages for c in conversations]),
            pa.array([c.tools for c in conversations], pa.string()),
        ],
        schema=schema(),
    )


def schema() -> "pa.Schema":
    """Return the columns of a prepared data set; train rows do not have the last two."""
    import pyarrow as pa

    kinds = {"supervised": pa.bool_()}
    message = pa.struct([(name, kinds.get(name, pa.string())) for name in MESSAGE_FIELDS])
    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("id", pa.string()),
            ("location", pa.string()),
            ("rendered", pa.int32()),
            ("findings", pa.string()),
            ("messages", pa.list_(message)),
            ("tools", pa.string()),
        ]
    )


def _messages_array(rows: Sequence[Sequence[Message]]) -> "pa.ListArray":
    """Return the messages of each row as one Arrow array, built column by column."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    flat = [message for row in rows for message in row]
    columns: dict[str, Any] = {
        "role": [m.role for m in flat],
        "content": [m.content for m in flat],
        "supervised": [m.supervised and m.is_answer for m in flat],
    }
    if any(m.tool_calls or m.name or m.reasoning or m.call_id for m in flat):
        columns |= {
            "tool_calls": [calls_to_text(m.tool_calls) for m in flat],
            "name": [m.name for m in flat],
            "reasoning": [m.reasoning for m in flat],
            "call_id": [m.call_id for m in flat],
        }
    else:
        columns |= dict.fromkeys(MESSAGE_FIELDS[3:], pa.repeat(pa.scalar(""), len(flat)))
    kind = schema().field("messages").type.value_type
    arrays = [pa.array(columns[name], kind.field(name).type) for name in MESSAGE_FIELDS]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(arrays, fields=list(kind)))


def _count_kept(conversations: Sequence[Conversation], batch: EncodedBatch, stats: DatasetStats) -> None:
    """Add the tokens, turns and findings of kept rows to the counts."""
    kept = len(batch.ids)
    stats.add("tokens", "kept", kept)
    stats.add("tokens", "rendered", kept + stats.count("tokens", "cut"))
    stats.add("tokens", "supervised", int((batch.labels >= 0).sum()))
    flat = [message for conversation in conversations for message in conversation.messages]
    stats.counts["turns"].update([message.role for message in flat])
    stats.add("turns", "supervised", sum(message.is_answer and message.supervised for message in flat))
    for findings in batch.findings:
        for name in findings:
            if not name.startswith("cut_"):  # counted as overflow already
                stats.add("repaired" if name in REPAIRS else "findings", name)


_POOL_FROM = 3  # chunks; fewer are processed sooner than processes start
_shared: tuple[Encoder, ChunkTask] | None = None  # what forked workers inherit


def process_chunks(chunks: Iterator[Chunk], encoder: Encoder, task: ChunkTask) -> Iterator[ChunkResult]:
    """Yield results in the order of the chunks, from several processes where there are enough chunks."""
    global _shared
    # 1. A few chunks are processed here, sooner than processes start.
    first = [chunk for _, chunk in zip(range(_POOL_FROM), chunks, strict=False)]
    workers = task.data.processes or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if len(first) < _POOL_FROM or workers == 1:
        yield from (process_chunk(chunk, encoder, task) for chunk in chain(first, chunks))
        return
    # 2. Forked workers inherit the encoder, and get the chunks.
    _shared = (encoder, task)
    waiting: deque[Future[ChunkResult]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for chunk in chain(first, chunks):
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * workers:  # enough to keep all busy, few enough for memory to stay flat
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            _shared = None


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    # A worker whose parent was killed would wait forever: its siblings hold the pipe open. The kernel ends it.
    exit_with_parent()


def _work(chunk: Chunk) -> ChunkResult:
    assert _shared is not None
    encoder, task = _shared
    return process_chunk(chunk, encoder, task)
