"""Chunks of source rows through all steps: parse, render, encode, truncate, verify; in one process or in several."""

import gc
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
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
from minisft.data.renderers.base import RefusedError
from minisft.data.split import identity_key, prompt_key
from minisft.data.stats import DatasetStats, RowProblem
from minisft.data.truncation import truncate
from minisft.data.unrolling import RenderedRow, unroll
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
        keys: The split key of each kept conversation, uint64.
        identities: A hash of each kept conversation, uint64.
        rows: The number of rows of each kept conversation, int32.
        lengths: The number of tokens of each kept row, int32.
        stats: The counts.
    """

    table: bytes
    keys: np.ndarray
    identities: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    stats: DatasetStats = field(default_factory=DatasetStats)


@dataclass(frozen=True)
class KeptRow:
    """A row of the data set.

    Args:
        number: Number of its conversation among those of the chunk that were rendered.
        answer: Number of its answer in the conversation, from 1; None where the row is the complete conversation.
        conversation: The conversation as far as the row holds it.
    """

    number: int
    answer: int | None
    conversation: Conversation


def process_chunk(chunk: Chunk, encoder: Encoder, task: ChunkTask) -> ChunkResult:
    """Parse, check, render, encode, truncate and verify the rows of a chunk."""
    stats = DatasetStats()
    was_on = gc.isenabled()
    gc.disable()  # rows hold no cycles, and the search for cycles among so many objects takes a tenth of the time
    try:
        # 1. Rows to conversations, and these to segments: one row each, or one row per answer.
        read = _render_rows(chunk, encoder, task, stats)
        rows = [(number, row) for number, (_, parts) in enumerate(read) for row in parts]
        # 2. Segments to ids and labels.
        batch = encoder.encode_rendered([row.rendered for _, row in rows], [row.conversation for _, row in rows])
        # 3. Truncate the rows that are too long.
        kept = [KeptRow(number, row.answer, row.conversation) for number, row in rows]
        full_lengths = np.diff(batch.offsets)
        if (full_lengths > task.data.max_length).any():
            kept, batch, full_lengths = _truncate_rows(kept, batch, encoder, task, stats)
        # 4. Verify the rows as they are written.
        if task.data.verify and kept:
            verify(encoder, [row.conversation for row in kept], batch)
        # 5. Make the table, and the keys for the split and for the count of duplicates.
        groups = [list(group) for _, group in groupby(range(len(kept)), key=lambda place: kept[place].number)]
        conversations = [_as_read(kept[group[-1]], read) for group in groups]
        _count_kept(conversations, groups, kept, batch, stats)
        _count_unrolled(groups, kept, read, encoder, full_lengths, stats)
        table = _flat_table(kept, conversations, groups, batch, full_lengths, chunk.source)
        keys = np.fromiter((prompt_key(c, task.seed) for c in conversations), np.uint64, len(conversations))
        identities = np.fromiter(map(identity_key, conversations), np.uint64, len(conversations))
        counts = np.fromiter(map(len, groups), np.int32, len(groups))
        lengths = np.diff(batch.offsets).astype(np.int32)
        return ChunkResult(table.serialize().to_pybytes(), keys, identities, counts, lengths, stats)
    finally:
        if was_on:
            gc.enable()


# --- rows to renderings -----------------------------------------------------------------------------------


def _render_rows(
    chunk: Chunk, encoder: Encoder, task: ChunkTask, stats: DatasetStats
) -> list[tuple[Conversation, list[RenderedRow]]]:
    """Return the conversations of the chunk with their rows. Those that cannot be used are counted in `stats`."""
    read: list[tuple[Conversation, list[RenderedRow]]] = []
    format = task.formats[chunk.source]
    stats.add("rows", "read", len(chunk) + chunk.left_out)
    if chunk.left_out:
        stats.add("skipped", LEFT_OUT_BY_WEIGHT, chunk.left_out)
    for location, row in chunk.parsed():
        repairs: tuple[str, ...] = ()
        try:
            if task.data.invalid == "repair":
                conversation, repairs = repaired_conversation(row, location, format)
            else:
                conversation = to_conversation(row, location, format)
                check_order(conversation.messages)
            if sum(len(message.content) for message in conversation.messages) > LARGEST_ROW:
                raise row_too_large_error()
            conversation = conversation.supervise(task.data.train_on)
            rows = unroll(conversation, encoder.render(conversation), encoder.render, task.data.unroll)
        except RowError as error:
            repairable = True
            try:
                repaired_conversation(row, location, format)
            except (RowError, RecursionError):
                repairable = False
            stats.skip(RowProblem(location, error.reason, error.problem, error.fix, repairable))
        except RecursionError:
            problem = "its values are nested too deeply"
            stats.skip(RowProblem(location, "nested_too_deeply", problem, "write plain texts"))
        except RefusedError as error:
            stats.skip(_refused(location, error))
        else:
            for unrolled in rows:
                unrolled.rendered.findings.extend(repairs)
                if unrolled.rendered.prompt_differs:
                    unrolled.rendered.findings.append("prompt_differs")
            read.append((conversation, rows))
            stats.add_ignored(ignored_columns(row, format))
    return read


def repaired_conversation(row: Any, location: str, format: str) -> tuple[Conversation, tuple[str, ...]]:
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
    fix = "choose another data.template or data.template_options, or let `invalid: skip` leave the row out"
    return RowProblem(location, error.reason, error.problem, fix)


# --- rows that are too long -------------------------------------------------------------------------------


def _truncate_rows(
    rows: Sequence[KeptRow], batch: EncodedBatch, encoder: Encoder, task: ChunkTask, stats: DatasetStats
) -> tuple[list[KeptRow], EncodedBatch, np.ndarray]:
    """Truncate the rows above `max_length`, and leave out those that cannot be truncated.

    Returns:
        The rows that are kept, their tokens, and the number of tokens of each before truncation.
    """
    limit, overflow = task.data.max_length, task.data.overflow
    kept: list[tuple[KeptRow, Encoded, int]] = []
    lost: dict[int, RowProblem] = {}  # by the conversation's number: the reason why its first lost row is lost
    for place, row in enumerate(rows):
        conversation, encoded = row.conversation, batch[place]
        full = len(encoded.input_ids)
        if full > limit:
            try:
                truncated = truncate(conversation, encoded, encoder.encode, limit, overflow)
            except RefusedError as error:  # the template takes the complete conversation, but not a shorter one
                lost.setdefault(row.number, _refused(conversation.location, error))
                continue
            if truncated.encoded is None:
                problem = f"no supervised answer begins within the first {limit:,} of {full:,} tokens"
                if truncated.reason == "too_long":
                    problem = f"{full:,} tokens, more than data.max_length {limit:,}"
                fix = "raise data.max_length, or choose another data.overflow"
                lost.setdefault(row.number, RowProblem(conversation.location, truncated.reason, problem, fix))
                continue
            cut = truncated.kind or "trailing"
            stats.add("overflow", cut)
            stats.add("tokens", "cut", full - len(truncated.encoded.input_ids))
            stats.add("turns", "dropped", len(conversation.messages) - len(truncated.conversation.messages))
            findings = tuple(dict.fromkeys([*truncated.encoded.findings, *encoded.findings, f"cut_{cut}"]))
            row = replace(row, conversation=truncated.conversation)
            encoded = replace(truncated.encoded, findings=findings)
        kept.append((row, encoded, full))
    # A conversation is kept if any of its rows is.
    complete = {row.number: row for row in rows}
    left = {row.number: row for row, _, _ in kept}
    for number, reason in lost.items():
        if number not in left or overflow == "error":
            stats.skip(reason)
            continue
        stats.add("overflow", "turns")
        before, after = complete[number].conversation.messages, left[number].conversation.messages
        stats.add("turns", "dropped", len(before) - len(after))
    encoded_rows = [encoded for _, encoded, _ in kept]
    offsets = np.concatenate([[0], np.cumsum([len(row.input_ids) for row in encoded_rows], dtype=np.int64)])
    ids = np.fromiter((i for row in encoded_rows for i in row.input_ids), np.int32, int(offsets[-1]))
    labels = np.fromiter((i for row in encoded_rows for i in row.labels), np.int32, int(offsets[-1]))
    kept_batch = EncodedBatch(
        ids,
        labels,
        offsets,
        [row.answers for row in encoded_rows],
        [row.findings for row in encoded_rows],
        [row.left_out for row in encoded_rows],
    )
    return [row for row, _, _ in kept], kept_batch, np.array([full for _, _, full in kept], dtype=np.int64)


def _as_read(row: KeptRow, read: Sequence[tuple[Conversation, list[RenderedRow]]]) -> Conversation:
    """Return the conversation up to the end of its last row, with all its supervised answers."""
    if row.answer is None:
        return row.conversation
    conversation = read[row.number][0]
    return replace(conversation, messages=conversation.messages[: len(row.conversation.messages)])


# --- the table --------------------------------------------------------------------------------------------


def _flat_table(
    rows: Sequence[KeptRow],
    conversations: Sequence[Conversation],
    groups: Sequence[Sequence[int]],
    batch: EncodedBatch,
    rendered: np.ndarray,
    source: int,
) -> "pa.RecordBatch":
    """Return the rows as an Arrow record batch.

    Args:
        rows: The rows.
        conversations: The conversations that they belong to.
        groups: The places of the rows of each conversation.
        batch: The rows' tokens.
        rendered: The number of tokens of each row before truncation.
        source: The number of the rows' source.
    """
    import pyarrow as pa

    offsets = pa.array(batch.offsets.astype(np.int32))
    numbers = np.repeat(np.arange(len(groups), dtype=np.int32), list(map(len, groups)))
    messages = {group[-1]: c.messages for group, c in zip(groups, conversations, strict=True)}
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(offsets, pa.array(batch.ids)),
            pa.ListArray.from_arrays(offsets, pa.array(batch.labels)),
            pa.array([row.conversation.id for row in rows], pa.string()),
            pa.array([row.conversation.location for row in rows], pa.string()),
            pa.array(rendered.astype(np.int32)),
            pa.array([",".join(findings) for findings in batch.findings], pa.string()),
            pa.array(np.full(len(rows), source, dtype=np.int32)),
            pa.array(numbers),
            pa.array([row.answer for row in rows], pa.int32()),
            _messages_array([messages.get(place) for place in range(len(rows))]),
            pa.array([row.conversation.tools for row in rows], pa.string()),
        ],
        schema=schema(),
    )


def schema() -> "pa.Schema":
    """Return the columns of prepared rows.

    Train rows do not have the last two. `source` is a number in the ledger's `source_names`. `conversation` and
    `answer` are written where a conversation has several rows: the number of the conversation, and that of the one
    answer that the row teaches.
    """
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
            ("source", pa.int32()),
            ("conversation", pa.int32()),
            ("answer", pa.int32()),
            ("messages", pa.list_(message)),
            ("tools", pa.string()),
        ]
    )


def _messages_array(rows: Sequence[Sequence[Message] | None]) -> "pa.ListArray":
    """Return the messages of each row, or null, as one Arrow array, built column by column."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(row or ()) for row in rows])]).astype(np.int32)
    flat = [message for row in rows for message in row or ()]
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
    values = pa.StructArray.from_arrays(arrays, fields=list(kind))
    missing = np.array([row is None for row in rows], dtype=bool)
    # In pyarrow, a list is null where its offset is.
    marked = pa.array(offsets, mask=np.append(missing, False)) if missing.any() else pa.array(offsets)
    return pa.ListArray.from_arrays(marked, values)


def _count_kept(
    conversations: Sequence[Conversation],
    groups: Sequence[Sequence[int]],
    rows: Sequence[KeptRow],
    batch: EncodedBatch,
    stats: DatasetStats,
) -> None:
    """Add the tokens of kept rows, and the turns and findings of their conversations, to the counts."""
    kept = len(batch.ids)
    stats.add("tokens", "kept", kept)
    stats.add("tokens", "rendered", kept + stats.count("tokens", "cut"))
    stats.add("tokens", "supervised", int((batch.labels >= 0).sum()))
    for conversation, group in zip(conversations, groups, strict=True):
        stats.counts["turns"].update([message.role for message in conversation.messages])
        supervised = sum(message.supervised for message in conversation.answers)
        left_out = batch.left_out[group[0]] if rows[group[0]].answer is None else supervised - len(group)
        stats.add("turns", "supervised", supervised - left_out)
        stats.add("unrolled", "answers_left_out", left_out)
        for name in dict.fromkeys(chain.from_iterable(batch.findings[place] for place in group)):
            if not name.startswith("cut_"):  # counted as overflow already
                stats.add("repaired" if name in REPAIRS else "findings", name)


def _count_unrolled(
    groups: Sequence[Sequence[int]],
    rows: Sequence[KeptRow],
    read: Sequence[tuple[Conversation, list[RenderedRow]]],
    encoder: Encoder,
    full_lengths: np.ndarray,
    stats: DatasetStats,
) -> None:
    """Count the conversations that have one row per answer, and their tokens in one row and in these rows."""
    unrolled = [group for group in groups if rows[group[0]].answer is not None]
    if not unrolled:
        return
    whole = [read[rows[group[0]].number][0] for group in unrolled]
    in_one_row = encoder.encode_rendered([encoder.render(conversation) for conversation in whole], whole)
    stats.add("unrolled", "conversations", len(unrolled))
    stats.add("unrolled", "tokens_before", len(in_one_row.ids))
    stats.add("unrolled", "tokens_after", int(sum(full_lengths[place] for group in unrolled for place in group)))


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
