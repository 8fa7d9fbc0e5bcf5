"""What the rows of the data hold, and how long they are in the tokens of a model."""

import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisft.console import row_progress
from minisft.data.conversation import Conversation
from minisft.data.encoder import IGNORED, Encoder
from minisft.data.formats import RowError, check_order, detect_format, to_conversation
from minisft.data.near_duplicates import NearDuplicateFinder
from minisft.data.pipeline import ChunkTask, process_chunks, repaired_conversation, schema
from minisft.data.readers import CHUNK_ROWS, Chunk, parse_json
from minisft.data.shards import with_formats
from minisft.data.sources import Source, read_source, source_files
from minisft.data.split import identity_key, prompt_key
from minisft.data.stats import DatasetStats
from minisft.errors import UserError
from minisft.recipe import DataRecipe

MOST_TOKENIZED = 5_000  # rows of the sample
MOST_PARSED = 200_000  # rows that are looked at; further ones are counted, and may be in the sample
_MOST_SCRIPT_CHARACTERS = 2_000_000  # of the sample
_MOST_SCRIPTS = 5
_UNLIMITED = 1 << 40  # tokens: no row is cut while lengths are measured


@dataclass
class RowSurvey:
    """What the rows hold.

    Attributes:
        rows: Number of rows.
        parsed: Number of rows that were looked at; the counts below are over these.
        all_read: False where reading stopped after `parsed` rows, as it does for data of the hub.
        formats: Format of each source.
        conversations: Rows that are a conversation as they stand.
        problems: Number of the other rows, by reason.
        repairable: Number of the other rows that `data.invalid: repair` keeps.
        repairs: Number of rows that each repair changes.
        turns: Number of messages by role, over all rows that are kept.
        with_tools: Conversations with functions on offer, calls or results.
        with_reasoning: Conversations whose answers separate their reasoning, or hold it in <think> tags.
        duplicates: Conversations that repeat an earlier one.
        near_duplicates: Other conversations that nearly repeat an earlier one (see `near_duplicates`).
        keys: (conversations,) Split keys of the conversations that are kept, uint64.
        sample: At most MOST_TOKENIZED rows as chunks, each row equally likely.
    """

    rows: int = 0
    parsed: int = 0
    all_read: bool = True
    formats: tuple[str, ...] = ()
    conversations: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    repairable: int = 0
    repairs: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    with_tools: int = 0
    with_reasoning: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    sample: tuple[Chunk, ...] = ()

    @property
    def usable(self) -> int:
        """Estimated number of rows that training and evaluation can use, with `data.invalid: repair`."""
        return round((self.conversations + self.repairable) / max(1, self.parsed) * self.rows)


@dataclass(frozen=True)
class OpenedData:
    """Sources whose first rows were read, so that their formats are known."""

    sources: tuple[Source, ...]
    formats: tuple[str, ...]
    chunks: Iterator[Chunk]


def open_data(sources: Sequence[Source]) -> OpenedData:
    """Open the sources and detect their formats.

    Raises:
        UserError: A source does not exist or is empty, or its first rows are not conversations of a known format.
    """
    streams = [read_source(source, index) for index, source in enumerate(sources)]
    chunks, formats = with_formats(streams, sources, DataRecipe(source=""))
    return OpenedData(tuple(sources), tuple(formats), chunks)


def survey_rows(data: OpenedData, seed: int = 0) -> RowSurvey:
    """Read all rows, look at the first MOST_PARSED of them, and draw the sample.

    Args:
        data: The opened sources.
        seed: The recipe's seed, by which rows are drawn and prompts are hashed.

    Raises:
        UserError: A file is damaged, the rows of a source have two formats, or no row is a conversation.
    """
    survey, draw = RowSurvey(formats=data.formats), random.Random(seed)
    finder, identities, keys = NearDuplicateFinder(seed), set[int](), list[int]()
    drawn: list[tuple[int, str, Any]] = []  # source, location, row or undecoded line
    first_problem: tuple[str, RowError] | None = None
    local = all(source_files(source) for source in data.sources)
    with row_progress(done_word="read") as progress:
        for chunk in data.chunks:
            # 1. Reservoir sampling (Vitter 1985, algorithm R), of lines that are not decoded yet.
            raw = [*chunk.rows, *((f"{chunk.name}:{number}", line) for number, line in chunk.lines)]
            for location, row in raw:
                survey.rows += 1
                if len(drawn) < MOST_TOKENIZED:
                    drawn.append((chunk.source, location, row))
                elif (place := draw.randrange(survey.rows)) < MOST_TOKENIZED:
                    drawn[place] = (chunk.source, location, row)
            # 2. What the rows hold.
            for location, row in chunk.parsed() if survey.parsed < MOST_PARSED else ():
                survey.parsed += 1
                expected, found = data.formats[chunk.source], detect_format(row)
                if found is not None and found != expected:
                    problem = f"the row is in the format {found}, and rows before it are in the format {expected}"
                    fix = "write the rows of each format into a file of their own, and give both: init FILE1 FILE2"
                    raise UserError(location, problem, fix)
                try:
                    conversation = _read_row(row, location, expected, survey)
                except RowError as error:
                    first_problem = first_problem or (location, error)
                    continue
                _count(conversation, survey)
                keys.append(prompt_key(conversation, seed))
                identity = identity_key(conversation)
                if identity in identities:
                    survey.duplicates += 1
                    continue
                identities.add(identity)
                finder.add("\n".join([message.text for message in conversation.messages]))
            progress(survey.rows)
            if not local and survey.parsed >= MOST_PARSED:
                survey.all_read = False
                break
    if not survey.conversations + survey.repairable:
        assert first_problem is not None
        location, row_error = first_problem
        problem = f"none of the {survey.parsed:,} rows is a conversation to train on; of the first, {row_error.problem}"
        raise UserError(location, problem, row_error.fix)
    # 3. The sample as chunks, in the order of the rows' sources.
    drawn.sort(key=lambda item: item[0])
    survey.keys = np.array(keys, dtype=np.uint64)
    survey.near_duplicates = int(finder.near_duplicates().sum())
    survey.sample = tuple(_as_chunks(drawn))
    return survey


def _read_row(row: Any, location: str, format: str, survey: RowSurvey) -> Conversation:
    """Return the conversation of a row, repaired where needed, and count what was found.

    Raises:
        RowError: The row is no conversation, and cannot be repaired.
    """
    try:
        conversation = to_conversation(row, location, format)
        check_order(conversation.messages)
    except RecursionError:
        survey.problems["nested_too_deeply"] += 1
        raise RowError("nested_too_deeply", "its values are nested too deeply", "write plain texts") from None
    except RowError as error:
        survey.problems[error.reason] += 1
        conversation, repairs = repaired_conversation(row, location, format)
        survey.repairable += 1
        survey.repairs.update(repairs)
    else:
        survey.conversations += 1
    return conversation


def _count(conversation: Conversation, survey: RowSurvey) -> None:
    messages = conversation.messages
    survey.turns.update([message.role for message in messages])
    survey.with_tools += bool(conversation.tools) or any(m.tool_calls or m.role == "tool" for m in messages)
    survey.with_reasoning += any(m.is_answer and (m.reasoning or "<think>" in m.content) for m in messages)


def _as_chunks(drawn: Sequence[tuple[int, str, Any]]) -> Iterator[Chunk]:
    for index in sorted({source for source, _, _ in drawn}):
        rows = [(place, parse_json(row) if isinstance(row, bytes) else row) for s, place, row in drawn if s == index]
        for start in range(0, len(rows), CHUNK_ROWS):
            yield Chunk(index, "sample", rows=tuple(rows[start : start + CHUNK_ROWS]))


# --- tokens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenSurvey:
    """The sample in the tokens of a model. Rows are those of training: one for each conversation, or for each answer.

    Attributes:
        template: Name of the template.
        stop_tokens: Texts of its stop tokens.
        conversations: Number of conversations in the sample.
        lengths: (rows,) Tokens.
        supervised: (rows,) Supervised tokens.
        answers: (answers,) Tokens of each supervised answer, its terminator included.
        ends: (answers,) Number of tokens of the row up to the end of the answer.
        is_last: (answers,) Whether the answer is the last one of its row.
        characters: Characters of these answers.
        scripts: Share of the letters by Unicode script, the largest first.
        stats: Counts of the preparation: skipped rows by reason, and findings.
    """

    template: str
    stop_tokens: tuple[str, ...]
    conversations: int
    lengths: np.ndarray
    supervised: np.ndarray
    answers: np.ndarray
    ends: np.ndarray
    is_last: np.ndarray
    characters: int
    scripts: dict[str, float]
    stats: DatasetStats

    def __post_init__(self) -> None:
        assert self.lengths.shape == self.supervised.shape
        assert self.answers.shape == self.ends.shape == self.is_last.shape

    @property
    def refused(self) -> int:
        """Number of conversations of the sample that this template cannot write."""
        return self.stats.skipped

    @property
    def per_character(self) -> float:
        """Tokens for each character of the answers, without terminators."""
        return float(self.answers.sum() - self.answers.size) / max(1, self.characters)


def survey_tokens(survey: RowSurvey, encoder: Encoder, seed: int = 0) -> TokenSurvey:
    """Encode the sample as `prepare` does, without a limit of length.

    Raises:
        UserError: The template can write no row of the sample.
    """
    import pyarrow as pa

    data = DataRecipe(source="", max_length=_UNLIMITED, invalid="repair", verify=False)
    task = ChunkTask(data, survey.formats, seed)
    stats, conversations = DatasetStats(), 0
    parts: list[tuple[np.ndarray, ...]] = []
    characters, letters = 0, Counter[str]()
    for result in process_chunks(iter(survey.sample), encoder, task):
        batch = pa.ipc.read_record_batch(pa.py_buffer(result.table), schema())
        labels = batch.column("labels")
        parts.append(answer_places(labels.flatten().to_numpy(), labels.offsets.to_numpy()))
        conversations += len(result.keys)
        messages = batch.column("messages").flatten()
        texts = messages.field("content")
        if letters.total() < _MOST_SCRIPT_CHARACTERS:
            letters.update("".join(texts.to_pylist()))
        characters += sum(map(len, texts.filter(messages.field("supervised")).to_pylist()))
        stats.merge(result.stats)
    unusable = Counter(survey.problems)
    for reason in [*stats.counts["skipped"]]:  # what is wrong with the rows, whatever the template, is known already
        if reason in unusable:
            del stats.counts["skipped"][reason]
    if not conversations:
        reasons = ", ".join(f"{name} {number:,}" for name, number in stats.section("skipped").items())
        problem = f"the template {encoder.template_name} can write none of the conversations ({reasons})"
        fix = stats.problems[0].fix if stats.problems else "give other conversations"
        raise UserError("data.template", problem, fix)
    lengths, supervised, answers, ends, is_last = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenSurvey(
        template=encoder.template_name,
        stop_tokens=tuple(encoder.tokenizer.convert_ids_to_tokens(list(encoder.stop_token_ids))),
        conversations=conversations,
        lengths=lengths,
        supervised=supervised,
        answers=answers,
        ends=ends,
        is_last=is_last,
        characters=characters,
        scripts=scripts(letters),
        stats=stats,
    )


def answer_places(labels: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return where the supervised answers of some rows are; an answer is a run of labels.

    Args:
        labels: int32 (tokens,); -100 where a token is not supervised.
        offsets: (rows + 1,) Starts of the rows.

    Returns:
        Tokens and supervised tokens of each row; tokens of each answer, the tokens of its row up to its end, and
        whether it is the last answer of its row.
    """
    offsets = offsets - offsets[0]
    is_supervised = labels != IGNORED
    row_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    changes = np.append(True, (is_supervised[1:] != is_supervised[:-1]) | (row_of[1:] != row_of[:-1]))
    starts = np.flatnonzero(changes)
    lengths = np.diff(np.append(starts, len(labels)))
    chosen = is_supervised[starts]
    starts, lengths = starts[chosen], lengths[chosen]
    rows = row_of[starts]
    is_last = np.append(rows[1:] != rows[:-1], True)[: len(rows)]
    supervised = np.bincount(rows, weights=lengths, minlength=len(offsets) - 1).astype(np.int64)
    return np.diff(offsets), supervised, lengths, starts + lengths - offsets[rows], is_last


def scripts(characters: Counter[str]) -> dict[str, float]:
    """Return the share of letters by script, the largest first, at most five and none below 0.1 %.

    The script is the first word of a letter's Unicode name, such as LATIN, CYRILLIC or CJK; it is not a language.
    """
    found = Counter[str]()
    for character, number in characters.items():
        if character.isalpha():
            found[unicodedata.name(character, "UNKNOWN").split()[0].lower()] += number
    total = found.total()
    return {name: number / total for name, number in found.most_common(_MOST_SCRIPTS) if number >= total / 1000}
