"""Conversation to segments of text and control tokens, with the answers marked; and the same for a prompt alone.

The same code renders for training, evaluation and chat. A segment is a text that is encoded separately, or one control
token: content is always text, so nothing that a user types becomes a control token, and an answer always starts a
new segment, so the prompt is an id prefix of the training row.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minisft.data.conversation import Message
from minisft.data.renderers.templates import TurnTemplate, with_tools

# The place of a segment in the text. It matters to tokenizers that put a space before a text that starts.
START, AFTER_CONTROL, CONTINUE = 0, 1, 2


class Segment(NamedTuple):
    """A text to encode separately, or (where `control` is not -1) one control token.

    `context` is START, AFTER_CONTROL or CONTINUE; `answer` is true for an answer's text and its terminator.
    """

    text: str
    control: int
    supervised: bool
    context: int
    answer: bool


class Answer(NamedTuple):
    """The place of an answer: segments[start:end], the terminator last; `text` is what they must decode to."""

    message: int
    start: int
    end: int
    text: str
    terminated: bool


@dataclass(slots=True)
class Rendered:
    """A conversation as segments.

    Attributes:
        segments: The segments in order.
        answers: The answers that the rendering shows, in order.
        findings: Names of what the template changed, for the ledger.
        left_out: The messages whose answers are supervised in the conversation but not here, since the template writes
            them otherwise in the history than as the last message, which is how they are served.
        prompt_differs: Whether a supervised answer follows another prompt here than the one that serving sends.
    """

    segments: list[Segment]
    answers: list[Answer]
    findings: list[str]
    left_out: tuple[int, ...] = ()
    prompt_differs: bool = False


class RefusedError(Exception):
    """The template cannot render a conversation faithfully; `reason` is the name under which the ledger counts it."""

    def __init__(self, reason: str, problem: str) -> None:
        self.reason = reason
        self.problem = problem
        super().__init__(reason, problem)


@dataclass(frozen=True)
class Control:
    """A control token; `lstrip` and `rstrip` say whether it takes the white space before or after it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class MarkerSplitter:
    """Split a template's own text at the control tokens that it spells, as the tokenizer would.

    Results are remembered, since a template writes few different texts.
    """

    def __init__(self, controls: Mapping[str, Control]) -> None:
        self.controls = dict(controls)
        longest_first = sorted((name for name in controls if name), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._memo: dict[tuple[str, bool, bool], tuple[str, list[Segment], str]] = {}

    def split(self, text: str, supervised: bool, answer: bool) -> tuple[str, list[Segment], str]:
        """Return the text before the first control token, the segments up to the last one, and the text after it."""
        key = (text, supervised, answer)
        parts = self._memo.get(key)
        if parts is None:
            parts = self._split(text, supervised, answer)
            if len(self._memo) < 4096:
                self._memo[key] = parts
        return parts

    def _split(self, text: str, supervised: bool, answer: bool) -> tuple[str, list[Segment], str]:
        head, position = "", 0
        segments: list[Segment] = []
        for match in self._pattern.finditer(text) if self._pattern else ():
            control = self.controls[match.group()]
            before = text[position : match.start()]
            if control.lstrip:
                before = before.rstrip()
            if not segments:
                head = before
            elif before:
                segments.append(Segment(before, -1, supervised, AFTER_CONTROL, answer))
            segments.append(Segment("", control.id, supervised, 0, answer))
            position = match.end()
            if control.rstrip:
                position += len(text[position:]) - len(text[position:].lstrip())
        return (head, segments, text[position:]) if segments else (text, [], "")


class SegmentBuilder:
    """Collect segments: adjacent texts are joined, and a control token or a boundary ends a segment."""

    __slots__ = ("_buffer", "_context", "_pending", "_start", "answers", "segments", "splitter")

    def __init__(self, splitter: MarkerSplitter) -> None:
        self.splitter = splitter
        self.segments: list[Segment] = []
        self.answers: list[Answer] = []
        self._buffer: list[str] = []  # texts of the current segment
        self._pending = ""  # text of the template that is not split yet
        self._context = START
        self._start = 0

    def template(self, text: str) -> None:
        """Add text of the template, in which control tokens are recognised."""
        self._pending += text

    def template_in_answer(self, text: str, supervised: bool) -> None:
        """Add text of the template within an answer."""
        self._settle()
        self._split(text, supervised, True)

    def content(self, text: str) -> None:
        """Add text of the conversation, which is never a control token."""
        self._settle()
        self._buffer.append(text)

    def flush(self, supervised: bool = False, answer: bool = False) -> None:
        """End the segment."""
        self._settle()
        self._end_segment(supervised, answer)

    def separate(self) -> None:
        """End the segment; the next text is encoded as if nothing were before it."""
        self.flush()
        self._context = START

    def open_answer(self) -> None:
        """Begin an answer with a new segment."""
        self.flush()
        self._start = len(self.segments)

    def close_answer(self, message: int, text: str, supervised: bool, terminated: bool = True) -> None:
        """End the answer that was opened last; `text` is what its segments must decode to."""
        self.flush(supervised, True)
        self.answers.append(Answer(message, self._start, len(self.segments), text, terminated))

    def control(self, token: int, supervised: bool, answer: bool = False) -> None:
        """Add one control token by its id."""
        self.flush(supervised, answer)
        self.segments.append(Segment("", token, supervised, 0, answer))
        self._context = AFTER_CONTROL

    def _settle(self) -> None:
        if self._pending:
            text, self._pending = self._pending, ""
            self._split(text, False, False)

    def _split(self, text: str, supervised: bool, answer: bool) -> None:
        head, segments, tail = self.splitter.split(text, supervised, answer)
        if head:
            self._buffer.append(head)
        if segments:
            self._end_segment(supervised, answer)
            self.segments.extend(segments)
            self._context = AFTER_CONTROL
            if tail:
                self._buffer.append(tail)

    def _end_segment(self, supervised: bool, answer: bool) -> None:
        if self._buffer:
            text = "".join(self._buffer)
            self._buffer.clear()
            if text:
                self.segments.append(Segment(text, -1, supervised, self._context, answer))
                self._context = CONTINUE


Renderer = Callable[[Sequence[Message], Sequence[str], bool], Rendered]


# --- turn templates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TurnRenderer:
    """Render a turn template on one tokenizer.

    Args:
        template: The template.
        splitter: The tokenizer's control tokens.
        terminator: The id that ends an answer: the template's end, or EOS where that end is not a token.
    """

    template: TurnTemplate
    splitter: MarkerSplitter
    terminator: int

    def __call__(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> Rendered:
        template, findings = self.template, []
        builder = SegmentBuilder(self.splitter)
        if template.begin:
            builder.template(template.begin)
        if tools and (not messages or messages[0].role != "system"):
            self._turn(builder, "system", with_tools("", tools))
            tools = ()
        for index, message in enumerate(messages):
            text = message.text
            if message.reasoning:
                findings.append("reasoning_dropped")
            if template.trim and text != text.strip():
                findings.append("trimmed")
                text = text.strip()
            if message.is_answer:
                builder.template(template.open_turn("assistant"))
                builder.open_answer()
                builder.content(text)
                builder.control(self.terminator, message.supervised, True)
                builder.close_answer(index, text, message.supervised)
                builder.template(template.after)
            else:
                self._turn(builder, message.role, with_tools(text, tools if index == 0 else ()))
        if prompt:
            builder.template(template.open_turn("assistant"))
        builder.flush()
        return Rendered(builder.segments, builder.answers, findings)

    def _turn(self, builder: SegmentBuilder, role: str, text: str) -> None:
        builder.template(self.template.open_turn(role))
        builder.content(text)
        builder.template(self.template.end + self.template.after)
