"""One chunk of source rows: parse, encode, truncate, verify; in this process or in several."""

import contextlib
import gc
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.data.conversation import Conversation, Message, calls_to_text
from minisft.data.encoder import AnswerSpan, Encoded, EncodedBatch, Encoder
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
SKIP_REASONS = "left_out_by_weight"
_CHARACTERS = ("nul_character", "lone_surrogate")


@dataclass(frozen=True)
class ChunkTask:
    """How rows are to be prepared."""

    data: DataRecipe
    formats: tuple[str, ...]
    seed: int


@dataclass
class EncodedRow:
    """A row that is kept, and how many tokens its full rendering has."""

    conversation: Conversation
    encoded: Encoded
    rendered: int


@dataclass
class ChunkResult:
    """What became of a chunk.

    Args:
        table: an Arrow record batch with the kept rows, serialised.
        keys: a split key for each.
        identities: a hash of the whole conversation for each.
        lengths: tokens of each.
        stats: the counts.
    """

    table: bytes
    keys: np.ndarray
    identities: np.ndarray
    lengths: np.ndarray
    stats: DatasetStats = field(default_factory=DatasetStats)


def process_chunk(chunk: Chunk, encoder: Encoder, task: ChunkTask) -> ChunkResult:
    """Parse, check, render, encode, fit and verify the rows of a chunk."""
    with _no_garbage_collection():
        return _process_chunk(chunk, encoder, task)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Rows hold no cycles, and looking for some among so many objects costs a tenth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _process_chunk(chunk: Chunk, encoder: Encoder, task: ChunkTask) -> ChunkResult:
    stats = DatasetStats()
    conversations, rendered = _render_rows(chunk, encoder, task, stats)
    batch = encoder.encode_rendered(rendered, conversations)
    if not (np.diff(batch.offsets) > task.data.max_length).any():
        rendered_lengths = np.diff(batch.offsets)
    else:
        kept = _truncate_rows(conversations, batch, encoder, task, stats)
        conversations = [row.conversation for row in kept]
        batch = _as_batch(kept)
        rendered_lengths = np.fromiter((row.rendered for row in kept), np.int64, len(kept))
    if task.data.verify and conversations:
        verify(encoder, conversations, batch)  # the rows as they are written
    table, lengths = _flat_table(conversations, batch, rendered_lengths, stats), np.diff(batch.offsets)
    keys = np.fromiter((prompt_key(c, task.seed) for c in conversations), np.uint64, len(conversations))
    identities = np.fromiter(map(identity_key, conversations), np.uint64, len(conversations))
    return ChunkResult(table.serialize().to_pybytes(), keys, identities, lengths.astype(np.int32), stats)


# --- rows to renderings -----------------------------------------------------------------------------------


def _render_rows(
    chunk: Chunk, encoder: Encoder, task: ChunkTask, stats: DatasetStats
) -> tuple[list[Conversation], list[Rendered]]:
    conversations, rendered = [], []
    stats.add("rows", "read", len(chunk) + chunk.left_out)
    if chunk.left_out:
        stats.add("skipped", SKIP_REASONS, chunk.left_out)
    for location, row in chunk.parsed():
        try:
            conversation, repairs = _read_row(row, location, task, chunk.source)
            rendering = encoder.render(conversation)
            rendering.findings.extend(repairs)
        except RowError as error:
            stats.skip(_problem(row, location, error, task, chunk.source))
        except RecursionError:
            stats.skip(
                RowProblem(location, "nested_too_deeply", "its values are nested too deeply", "write plain texts")
            )
        except RefusedError as error:
            stats.skip(_refused(location, error))
        else:
            conversations.append(conversation)
            rendered.append(rendering)
            stats.add_ignored(ignored_columns(row, task.formats[chunk.source]))
    return conversations, rendered


def _read_row(row: Any, location: str, task: ChunkTask, source: int) -> tuple[Conversation, tuple[str, ...]]:
    """The row's conversation in order, and how it was repaired where the recipe says so."""
    format = task.formats[source]
    repairs: tuple[str, ...] = ()
    if task.data.invalid == "repair":
        conversation, repairs = _repaired(row, location, format)
    else:
        conversation = to_conversation(row, location, format)
        check_order(conversation.messages)
    if sum(len(message.content) for message in conversation.messages) > LARGEST_ROW:
        raise row_too_large_error()
    return conversation.supervise(task.data.train_on), repairs


def _repaired(row: Any, location: str, format: str) -> tuple[Conversation, tuple[str, ...]]:
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


def _problem(row: Any, location: str, error: RowError, task: ChunkTask, source: int) -> RowProblem:
    return RowProblem(location, error.reason, error.problem, error.fix, _is_repairable(row, location, task, source))


def _is_repairable(row: Any, location: str, task: ChunkTask, source: int) -> bool:
    try:
        _repaired(row, location, task.formats[source])
    except (RowError, RecursionError):
        return False
    return True


# --- too long ---------------------------------------------------------------------------------------------


def _truncate_rows(
    conversations: Sequence[Conversation], batch: EncodedBatch, encoder: Encoder, task: ChunkTask, stats: DatasetStats
) -> list[EncodedRow]:
    limit, overflow = task.data.max_length, task.data.overflow
    kept = []
    for row, conversation in enumerate(conversations):
        encoded = batch[row]
        full = len(encoded.input_ids)
        if full > limit:
            try:
                truncated = truncate(conversation, encoded, encoder.encode, limit, overflow)
            except RefusedError as error:  # the template takes the whole conversation, but not a shorter one
                stats.skip(_refused(conversation.location, error))
                continue
            if truncated.encoded is None:
                stats.skip(_too_long(conversation, truncated.reason, full, limit))
                continue
            stats.add("overflow", truncated.kind or "trailing")
            stats.add("tokens", "cut", full - len(truncated.encoded.input_ids))
            stats.add("turns", "dropped", len(conversation.messages) - len(truncated.conversation.messages))
            conversation, repairs = truncated.conversation, encoded.findings
            findings = tuple(
                dict.fromkeys([*truncated.encoded.findings, *repairs, f"cut_{truncated.kind or 'trailing'}"])
            )
            encoded = replace(truncated.encoded, findings=findings)
        kept.append(EncodedRow(conversation, encoded, full))
    return kept


def _too_long(conversation: Conversation, reason: str, length: int, limit: int) -> RowProblem:
    if reason == "too_long":
        problem = f"{length:,} tokens, more than data.max_length {limit:,}"
    else:
        problem = f"no supervised answer begins within the first {limit:,} of {length:,} tokens"
    return RowProblem(conversation.location, reason, problem, "raise data.max_length, or choose another data.overflow")


def _as_batch(kept: Sequence[EncodedRow]) -> EncodedBatch:
    sizes = np.fromiter((len(row.encoded.input_ids) for row in kept), np.int64, len(kept))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids = np.fromiter((i for row in kept for i in row.encoded.input_ids), np.int32, int(offsets[-1]))
    labels = np.fromiter((i for row in kept for i in row.encoded.labels), np.int32, int(offsets[-1]))
    answers: list[tuple[AnswerSpan, ...]] = [row.encoded.answers for row in kept]
    return EncodedBatch(ids, labels, offsets, answers, [row.encoded.findings for row in kept])


# --- the table --------------------------------------------------------------------------------------------


def _flat_table(
    conversations: Sequence[Conversation], batch: EncodedBatch, rendered: np.ndarray, stats: DatasetStats
) -> "pa.RecordBatch":
    """The rows as an Arrow record batch, and their tokens and turns in the tally."""
    import pyarrow as pa

    _count(conversations, batch, stats)
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
    """The columns of a prepared data set; train rows go without the last two."""
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


def _count(conversations: Sequence[Conversation], batch: EncodedBatch, stats: DatasetStats) -> None:
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


_POOL_FROM = 3  # chunks; fewer are done sooner than processes start
_shared: tuple[Encoder, ChunkTask] | None = None  # what forked workers inherit


def process_chunks(chunks: Iterator[Chunk], encoder: Encoder, task: ChunkTask) -> Iterator[ChunkResult]:
    """Results in the order of the chunks, by several processes where there are enough of them."""
    first = [chunk for _, chunk in zip(range(_POOL_FROM), chunks, strict=False)]
    workers = task.data.processes or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if len(first) < _POOL_FROM or workers == 1:
        yield from (process_chunk(chunk, encoder, task) for chunk in chain(first, chunks))
        return
    yield from _in_pool(chain(first, chunks), encoder, task, workers)


def _in_pool(chunks: Iterable[Chunk], encoder: Encoder, task: ChunkTask, workers: int) -> Iterator[ChunkResult]:
    global _shared
    _shared = (encoder, task)
    waiting: deque[Future[ChunkResult]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for chunk in chunks:
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
    # A worker whose parent was killed would wait for ever: its siblings hold the pipe open. The kernel ends it.
    exit_with_parent()


def _work(chunk: Chunk) -> ChunkResult:
    assert _shared is not None
    encoder, task = _shared
    return process_chunk(chunk, encoder, task)
