"""Segments to input ids and labels: the `Encoder` that training, evaluation and chat share.

The Rust tokenizer encodes every segment separately, all segments of a batch of conversations in one call; control
tokens are placed by id. Labels are the ids where a segment is supervised and -100 elsewhere, unshifted.
"""

import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from minisft.data.conversation import Conversation, Message
from minisft.data.renderers.base import CONTINUE, START, Rendered, Renderer, Segment
from minisft.data.renderers.reasoning import separate_reasoning
from minisft.data.renderers.resolve import TemplateResolver
from minisft.data.renderers.template_options import Option
from minisft.data.segment_encoder import SegmentEncoder
from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


IGNORED = -100  # the label of a token without loss
_SHORT, _SHORT_TEXTS = 16, 65536  # the ids of texts of at most 16 characters are remembered, of at most 65536 texts


@dataclass(frozen=True)
class AnswerSpan:
    """The place of an answer's tokens in a row: ids[start:end], the terminator included."""

    message: int
    start: int
    end: int
    text: str
    supervised: bool
    terminated: bool = True
    cut: bool = False  # the row was too long, and the answer lost its end


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    Args:
        input_ids: The ids of the complete rendering.
        labels: The same ids where a token is supervised, -100 elsewhere; unshifted.
        answers: The answers in order.
        findings: Names of what the template or the tokenizer changed; the ledger counts them.
        left_out: Number of supervised answers that are written otherwise here than they are served, and so have no
            label.
    """

    input_ids: list[int]
    labels: list[int]
    answers: tuple[AnswerSpan, ...] = ()
    findings: tuple[str, ...] = ()
    left_out: int = 0

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise ValueError("input_ids and labels differ in length")


@dataclass
class EncodedBatch:
    """Conversations as flat arrays.

    Args:
        ids: int32 [tokens], the rows one after the other.
        labels: int32 [tokens]; -100 where a token is not supervised.
        offsets: int64 [rows + 1]; row i is ids[offsets[i]:offsets[i + 1]].
        answers: The answers of each row.
        findings: The findings of each row.
        left_out: Number of answers of each row that are left out; see `Encoded`.
    """

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    answers: list[tuple[AnswerSpan, ...]] = field(default_factory=list)
    findings: list[tuple[str, ...]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Encoded:
        span = slice(self.offsets[row], self.offsets[row + 1])
        ids, labels = self.ids[span].tolist(), self.labels[span].tolist()
        return Encoded(ids, labels, self.answers[row], self.findings[row], self.left_out[row])


class Encoder:
    """Conversations to ids and back, in one template on one tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        template: The template as in the recipe: a native template's name, "auto" (the tokenizer's own), the path of a
            Jinja file, or a Jinja text.
        options: Values for variables that a Jinja template reads.

    Attributes:
        template_name: The template in use; for `mistral` the form that was chosen.
        chat_template: The Jinja text to save with the model.
        stop_token_ids: The trained terminators, at which generation stops; the first is the main one.

    Raises:
        UserError: The template does not exist, the tokenizer lacks what the template needs, or the template does not
            read one of the variables.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        template: str = "auto",
        options: Mapping[str, Option] | None = None,
    ) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError("model", "its tokenizer has no fast (Rust) form", "use a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self._added = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items()}
        self._probe = SegmentEncoder(tokenizer)
        resolved = TemplateResolver(tokenizer, self._probe).resolve(template, options)
        self.template_name = resolved.name
        self.chat_template = resolved.chat_template
        self._render: Renderer = resolved.renderer
        self.stop_token_ids = resolved.stop_token_ids
        self._reads_reasoning, self._form = resolved.reads_reasoning, resolved.form
        special = {name for name, (_, token) in self._added.items() if token.special}
        ordinary = [m for m in resolved.markers if m in self._added and not self._added[m][1].special]
        self._segment_encoder = SegmentEncoder(tokenizer, ordinary) if ordinary else self._probe
        # An answer may hold ordinary tokens that its template writes, such as <think>: no user typed them.
        self._answer_spells = _spelling_pattern(special | set(resolved.plain_markers))
        self._spellings = {n for n in special | {*resolved.plain_markers, *resolved.markers} if n.strip()}
        self._spells = _spelling_pattern(self._spellings)
        self._answer_context = resolved.answer_context
        self._joint = resolved.joint
        self._boundary: dict[tuple[str, str], bool] = {}
        self._short: dict[tuple[str, int, bool], list[int]] = {}

    # --- public methods -----------------------------------------------------------------------------------

    def encode(self, conversation: Conversation, train_on: str = "assistant") -> Encoded:
        """Return ids and labels of one conversation; see `encode_batch`."""
        return self.encode_batch([conversation], train_on)[0]

    def encode_batch(self, conversations: Sequence[Conversation], train_on: str = "assistant") -> EncodedBatch:
        """Return ids and labels of many conversations, with one call of the tokenizer.

        Raises:
            RefusedError: The template cannot render a conversation faithfully.
        """
        rendered = [self.render(conversation, train_on) for conversation in conversations]
        return self.encode_rendered(rendered, conversations)

    def render(self, conversation: Conversation, train_on: str = "assistant") -> Rendered:
        """Return the segments of one conversation.

        Raises:
            RefusedError: The template cannot render it faithfully.
        """
        conversation = conversation.supervise(train_on)
        return self._render(conversation.messages, tool_lines(conversation.tools), False)

    def encode_rendered(self, rendered: Sequence[Rendered], conversations: Sequence[Conversation]) -> EncodedBatch:
        """Return ids and labels of conversations that are rendered already, with their answers and findings."""
        # 1. Ids and labels.
        ids, lengths, flags, counts = self._encode_segments([row.segments for row in rendered])
        labels = np.where(np.repeat(flags, lengths), ids, IGNORED).astype(np.int32)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        row_starts = np.concatenate([[0], np.cumsum(counts)])
        batch = EncodedBatch(ids, labels, ends[row_starts])
        # 2. The answers: from places among the segments to places among the ids.
        for row, start in zip(rendered, row_starts[:-1].tolist(), strict=True):
            segments, spans = row.segments, []
            places = (ends[start : start + len(segments) + 1] - ends[start]).tolist()
            for message, first, last, text, terminated in row.answers:
                supervised = segments[first].supervised if first < len(segments) else False
                spans.append(AnswerSpan(message, places[first], places[last], text, supervised, terminated))
            batch.answers.append(tuple(spans))
            batch.left_out.append(len(row.left_out))
        # 3. The findings. Mostly no text spells a marker, which one search through all texts shows.
        texts = "\0".join([message.text for conversation in conversations for message in conversation.messages])
        some_spell = any(name in texts for name in self._spellings)
        for row, conversation in zip(rendered, conversations, strict=True):
            findings = dict.fromkeys(row.findings)
            if some_spell and self.spells_marker(conversation.messages):
                findings["spells_control"] = None
            if self._joint and self._boundary_differs(row):
                findings["boundary"] = None
            batch.findings.append(tuple(findings))
        return batch

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """Return the prompt's ids at inference for the answer that follows `messages`: a prefix of its training row.

        Raises:
            RefusedError: The template cannot render the messages faithfully.
        """
        rendered = self._render(tuple(messages), tool_lines(tools), True)
        ids, _, _, _ = self._encode_segments([rendered.segments])
        return ids.tolist()

    def spells_marker(self, messages: Sequence[Message]) -> bool:
        """Return whether a text spells a control token, which other tools then read as that token."""
        return any((self._answer_spells if m.is_answer else self._spells)(m.text) for m in messages)

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, with or without their terminator."""
        stops = set(self.stop_token_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        special = {id for id, token in self._added.values() if token.special}
        return self._segment_encoder.decode(
            [token for token in ids[:end] if token not in special], self._answer_context
        )

    def split_answer(self, ids: Sequence[int]) -> tuple[str, str]:
        """Return the reasoning and the final answer of generated ids, with or without their terminator.

        The reasoning is "" for a template that writes none. Where the ids end within the reasoning, the answer is "".
        """
        if self._form is None:
            return "", self.decode_answer(ids)
        return self._without_special(self._form.split(self.spelled_answer(ids)))

    def partial_answer(self, ids: Sequence[int]) -> tuple[str, str]:
        """Return what is certain of the reasoning and the final answer while more ids may follow.

        The last character may be U+FFFD, where the bytes so far end within a character.
        """
        if self._form is None:
            return "", self.decode_answer(ids)
        return self._without_special(self._form.split_partial(self.spelled_answer(ids)))

    def spelled_answer(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids up to their terminator, with control tokens spelled out."""
        stops = set(self.stop_token_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return self._segment_encoder.decode(list(ids[:end]), self._answer_context)

    def spellings(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token on its own; they may be a part of a character."""
        return self._segment_encoder.spellings(ids)

    def _without_special(self, parts: tuple[str, str]) -> tuple[str, str]:
        names = sorted((name for name, (_, token) in self._added.items() if token.special), key=len, reverse=True)
        special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        reasoning, answer = (special.sub("", part) for part in parts)
        return reasoning, answer

    def final_texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the final answers of many answers' ids; the caller leaves out their terminators."""
        if self._form is None:
            return self.decode_answers(rows) if rows else []
        return [self.split_answer(ids)[1] for ids in rows]

    def final_answer(self, message: Message) -> str:
        """Return an answer's text without its reasoning, which may stand in <think> tags in the text."""
        return (separate_reasoning(message) if self._reads_reasoning else message).text

    def decode_answers(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of many answers' ids; the caller leaves out their terminators."""
        return self._segment_encoder.decode_many(rows, self._answer_context)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a plain text, after the BOS that the tokenizer puts before every text, if it puts one.

        Text that spells a control token is text.
        """
        bos = self.tokenizer.bos_token_id
        before = [token for token in self.tokenizer("")["input_ids"] if token == bos]
        return before + self._segment_encoder.encode([(text, START, False)])[0]

    def round_trip(self, text: str) -> str:
        """Encode and decode an answer's text. The result differs where the tokenizer's normaliser changes the text."""
        ids = self._segment_encoder.encode([(text, self._answer_context, True)])[0]
        return self._segment_encoder.decode(ids, self._answer_context)

    # --- encoding -----------------------------------------------------------------------------------------

    def _encode_segments(self, rows: Sequence[Sequence[Segment]]) -> tuple[np.ndarray, ...]:
        """Encode all segments in one call.

        Returns:
            Flat ids (int32), tokens per segment, supervised per segment (bool), segments per row.
        """
        segments = list(chain.from_iterable(rows))
        # 1. Control tokens have their id. Short texts are remembered: a template writes the same few in every row.
        parts: list[list[int] | None] = []
        for text, control, _, context, answer in segments:
            if control >= 0:
                parts.append([control])
            else:
                parts.append(self._short.get((text, context, answer)) if len(text) <= _SHORT else None)
        # 2. All other texts go to the tokenizer.
        unknown = [i for i, part in enumerate(parts) if part is None]
        encoded = self._segment_encoder.encode(
            [(segments[i].text, segments[i].context, segments[i].answer) for i in unknown]
        )
        for i, part_ids in zip(unknown, encoded, strict=True):
            parts[i] = part_ids
            text = segments[i].text
            if len(text) <= _SHORT and len(self._short) < _SHORT_TEXTS:
                self._short[text, segments[i].context, segments[i].answer] = part_ids
        # 3. Flatten.
        known = cast("list[list[int]]", parts)
        lengths = np.fromiter(map(len, known), np.int64, len(known))
        flat = array("i")
        for part in known:
            flat.fromlist(part)
        ids = np.frombuffer(flat, np.int32) if flat else np.zeros(0, np.int32)
        flags = np.fromiter((segment.supervised for segment in segments), bool, len(segments))
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return ids, lengths, flags, counts

    def _boundary_differs(self, row: Rendered) -> bool:
        """Return whether encoding a prompt and its answer jointly gives other ids than encoding them separately."""
        for answer in row.answers:
            if answer.start == 0 or answer.start >= len(row.segments):
                continue
            before, after = row.segments[answer.start - 1], row.segments[answer.start]
            if before.control >= 0 or after.control >= 0:
                continue
            tail, head = before.text[-16:], after.text[:32]
            key = (tail, head[:1] if head[:1].isalnum() else head)
            differs = self._boundary.get(key)
            if differs is None:
                joint = self._segment_encoder.ids("".join(key))
                separate = self._segment_encoder.encode([(tail, START, False), (key[1], CONTINUE, False)])
                differs = joint != separate[0] + separate[1]
                if len(self._boundary) < 65536:
                    self._boundary[key] = differs
            if differs:
                return True
        return False


def tool_lines(tools: str) -> list[str]:
    """Return the functions on offer as one JSON text each."""
    if not tools:
        return []
    parsed: Any = json.loads(tools)
    listed = parsed if isinstance(parsed, list) else [parsed]
    return [json.dumps(tool, ensure_ascii=False) for tool in listed]


def _spelling_pattern(markers: Iterable[str]) -> Any:
    """Return a function that is true for a text that spells one of the markers."""
    names = sorted({name for name in markers if name.strip()}, key=len, reverse=True)
    if not names:
        return lambda text: False
    starts = "".join(sorted({name[0] for name in names}))
    pattern = re.compile(f"(?=[{re.escape(starts)}])(?:{'|'.join(map(re.escape, names))})")
    return pattern.search
