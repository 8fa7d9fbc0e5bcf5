"""Segments to input ids and labels: the `Encoder` that training, evaluation and chat share.

Every run is encoded on its own by the Rust tokenizer, all runs of a batch of conversations in one call; control
tokens are placed by id. Labels are the ids where a run is supervised and -100 elsewhere, unshifted.
"""

import json
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from minisft.data.conversation import Conversation, Message
from minisft.data.renderers.base import CONTINUE, START, Answer, Rendered, Renderer, Segment
from minisft.data.renderers.resolve import TemplateResolver
from minisft.data.segment_encoder import SegmentEncoder
from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


IGNORED = -100  # the label of a token that is not learned
_SHORT, _SHORT_TEXTS = 16, 65536  # texts of so many characters are remembered, so many of them


@dataclass(frozen=True)
class AnswerSpan:
    """Where an answer's tokens lie in a row: ids[start:end], the terminator included."""

    message: int
    start: int
    end: int
    text: str
    supervised: bool
    terminated: bool = True
    cut: bool = False  # its end is missing: the row was too long


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    Args:
        input_ids: the whole rendering.
        labels: the same ids where they are learned, -100 elsewhere; unshifted.
        answers: the answers in order.
        findings: what the template or the tokenizer did that the ledger counts.
    """

    input_ids: list[int]
    labels: list[int]
    answers: tuple[AnswerSpan, ...] = ()
    findings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise ValueError("input_ids and labels differ in length")


@dataclass
class EncodedBatch:
    """Conversations as flat arrays.

    Args:
        ids: int32, the rows one after the other.
        labels: int32, of the same lengths; -100 where a token is not supervised.
        offsets: int64, rows + 1; row i is ids[offsets[i]:offsets[i + 1]].
        answers: each row's answers.
        findings: each row's findings.
    """

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    answers: list[tuple[AnswerSpan, ...]] = field(default_factory=list)
    findings: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Encoded:
        span = slice(self.offsets[row], self.offsets[row + 1])
        return Encoded(self.ids[span].tolist(), self.labels[span].tolist(), self.answers[row], self.findings[row])


class Encoder:
    """Conversations to ids and back, in one template on one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        template: as in the recipe: a native template's name, "auto" (the tokenizer's own), the path of a Jinja
            file, or a Jinja text.

    Attributes:
        template_name: the template in use; for `mistral` the form that was chosen.
        chat_template: the Jinja text to save with the model.
        stop_token_ids: the trained terminators, at which generation stops; the first is the main one.

    Raises:
        UserError: the template does not exist or the tokenizer cannot carry it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", template: str = "auto") -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError("model", "its tokenizer has no fast (Rust) form", "use a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self._added = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items()}
        self._probe = SegmentEncoder(tokenizer)
        resolved = TemplateResolver(tokenizer, self._probe).resolve(template)
        self.template_name = resolved.name
        self.chat_template = resolved.chat_template
        self._render: Renderer = resolved.renderer
        self.stop_token_ids = resolved.stop_token_ids
        special = {name for name, (_, token) in self._added.items() if token.special}
        ordinary = [m for m in resolved.markers if m in self._added and not self._added[m][1].special]
        self._runs = SegmentEncoder(tokenizer, ordinary) if ordinary else self._probe
        # An answer may hold the ordinary tokens that its template writes, such as <think>: nobody typed them.
        self._answer_spells = _spelling_pattern(special | set(resolved.plain_markers))
        self._spellings = {n for n in special | {*resolved.plain_markers, *resolved.markers} if n.strip()}
        self._spells = _spelling_pattern(self._spellings)
        self._answer_context = resolved.answer_context
        self._joint = resolved.joint
        self._boundary: dict[tuple[str, str], bool] = {}
        self._short: dict[tuple[str, int, bool], list[int]] = {}

    # --- what others call ---------------------------------------------------------------------------------

    def encode(self, conversation: Conversation, train_on: str = "assistant") -> Encoded:
        """Ids and labels of one conversation; see `encode_batch`."""
        return self.encode_batch([conversation], train_on)[0]

    def encode_batch(self, conversations: Sequence[Conversation], train_on: str = "assistant") -> EncodedBatch:
        """Ids and labels of many conversations, with one call of the tokenizer.

        Raises:
            RefusedError: the template cannot render a conversation faithfully.
        """
        rendered = [self.render(conversation, train_on) for conversation in conversations]
        return self.encode_rendered(rendered, conversations)

    def render(self, conversation: Conversation, train_on: str = "assistant") -> Rendered:
        """The runs of one conversation.

        Raises:
            RefusedError: the template cannot render it faithfully.
        """
        conversation = conversation.supervise(train_on)
        return self._render(conversation.messages, tool_lines(conversation.tools), False)

    def encode_rendered(self, rendered: Sequence[Rendered], conversations: Sequence[Conversation]) -> EncodedBatch:
        """Ids and labels of conversations that were rendered before."""
        ids, lengths, flags, counts = self._encode_segments([row.segments for row in rendered])
        labels = np.where(np.repeat(flags, lengths), ids, IGNORED).astype(np.int32)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        run_offsets = np.concatenate([[0], np.cumsum(counts)])
        batch = EncodedBatch(ids, labels, ends[run_offsets])
        for row, start in zip(rendered, run_offsets[:-1].tolist(), strict=True):
            places = (ends[start : start + len(row.segments) + 1] - ends[start]).tolist()
            batch.answers.append(tuple(_span(answer, places, row.segments) for answer in row.answers))
        self._add_findings(batch, rendered, conversations)
        return batch

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """The ids that are sent at inference for the answer that follows `messages`: a prefix of its training row.

        Raises:
            RefusedError: the template cannot render the messages faithfully.
        """
        rendered = self._render(tuple(messages), tool_lines(tools), True)
        ids, _, _, _ = self._encode_segments([rendered.segments])
        return ids.tolist()

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of generated ids, with or without their terminator."""
        stops = set(self.stop_token_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        special = {id for id, token in self._added.values() if token.special}
        return self._runs.decode([token for token in ids[:end] if token not in special], self._answer_context)

    def decode_answers(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of many answers' ids, their terminators left out by the caller."""
        return self._runs.decode_many(rows, self._answer_context)

    def round_trip(self, text: str) -> str:
        """What the tokenizer makes of an answer's text: not the text itself where its normaliser loses something."""
        ids = self._runs.encode([(text, self._answer_context, True)])[0]
        return self._runs.decode(ids, self._answer_context)

    # --- encoding -----------------------------------------------------------------------------------------

    def _encode_segments(self, rows: Sequence[Sequence[Segment]]) -> tuple[np.ndarray, ...]:
        """All runs in one call: flat ids, tokens per run, supervised per run, runs per row."""
        segments = list(chain.from_iterable(rows))
        parts: list[list[int] | None] = [self._known_ids(segment) for segment in segments]
        unknown = [i for i, part in enumerate(parts) if part is None]
        encoded = self._runs.encode([(segments[i].text, segments[i].context, segments[i].answer) for i in unknown])
        for i, found in zip(unknown, encoded, strict=True):
            parts[i] = found
            self._remember(segments[i], found)
        known = cast("list[list[int]]", parts)
        lengths = np.fromiter(map(len, known), np.int64, len(known))
        flat = array("i")
        for part in known:
            flat.fromlist(part)
        ids = np.frombuffer(flat, np.int32) if flat else np.zeros(0, np.int32)
        flags = np.fromiter((segment.supervised for segment in segments), bool, len(segments))
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return ids, lengths, flags, counts

    def _known_ids(self, segment: Segment) -> list[int] | None:
        """Ids of a control token, or of a short text that came before: templates write the same few ever again."""
        if segment.control >= 0:
            return [segment.control]
        return self._short.get((segment.text, segment.context, segment.answer)) if len(segment.text) <= _SHORT else None

    def _remember(self, segment: Segment, ids: list[int]) -> None:
        if len(segment.text) <= _SHORT and len(self._short) < _SHORT_TEXTS:
            self._short[segment.text, segment.context, segment.answer] = ids

    def _add_findings(
        self, batch: EncodedBatch, rendered: Sequence[Rendered], conversations: Sequence[Conversation]
    ) -> None:
        every = "\0".join([message.text for conversation in conversations for message in conversation.messages])
        spelled = any(name in every for name in self._spellings)  # mostly none is: a glance at all rows tells
        for row, conversation in zip(rendered, conversations, strict=True):
            found = dict.fromkeys(row.findings)
            if spelled and self._is_spelled(conversation):
                found["spells_control"] = None
            if self._joint and self._boundary_differs(row):
                found["boundary"] = None
            batch.findings.append(tuple(found))

    def _is_spelled(self, conversation: Conversation) -> bool:
        messages = conversation.messages
        return any((self._answer_spells if m.is_answer else self._spells)(m.text) for m in messages)

    def _boundary_differs(self, row: Rendered) -> bool:
        """Whether encoding a prompt and its answer in one piece would give other ids than encoding them apart."""
        for answer in row.answers:
            if answer.start == 0 or answer.start >= len(row.segments):
                continue
            before, after = row.segments[answer.start - 1], row.segments[answer.start]
            if before.control >= 0 or after.control >= 0:
                continue
            if self._merges(before.text[-16:], after.text[:32]):
                return True
        return False

    def _merges(self, tail: str, head: str) -> bool:
        key = (tail, head if not head[:1].isalnum() else head[:1])
        known = self._boundary.get(key)
        if known is None:
            joint = self._runs.ids(tail + key[1])
            apart = self._runs.encode([(tail, START, False), (key[1], CONTINUE, False)])
            known = joint != apart[0] + apart[1]
            if len(self._boundary) < 65536:
                self._boundary[key] = known
        return known


def tool_lines(tools: str) -> list[str]:
    """The functions on offer as one JSON text each."""
    if not tools:
        return []
    parsed: Any = json.loads(tools)
    listed = parsed if isinstance(parsed, list) else [parsed]
    return [json.dumps(tool, ensure_ascii=False) for tool in listed]


def _span(answer: Answer, places: Sequence[int], segments: Sequence[Segment]) -> AnswerSpan:
    supervised = segments[answer.start].supervised if answer.start < len(segments) else False
    return AnswerSpan(
        answer.message, places[answer.start], places[answer.end], answer.text, supervised, answer.terminated
    )


def _spelling_pattern(markers: Iterable[str]) -> Any:
    """A function that says whether a text spells one of the markers."""
    names = sorted({name for name in markers if name.strip()}, key=len, reverse=True)
    if not names:
        return lambda text: False
    starts = "".join(sorted({name[0] for name in names}))
    pattern = re.compile(f"(?=[{re.escape(starts)}])(?:{'|'.join(map(re.escape, names))})")
    return pattern.search
