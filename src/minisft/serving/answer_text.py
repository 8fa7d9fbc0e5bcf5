"""From the token ids of one answer to pieces of its text: held back until they are certain, and cut at stop texts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minisft.data.conversation import ToolCall
from minisft.data.encoder import Encoder
from minisft.data.tool_calls import find_calls
from minisft.evaluation.generation import Finish, TokenScores

FinishReason = Literal["stop", "length", "tool_calls"]
# How answers begin a call: Hermes and Qwen, and Mistral.
_CALL_MARKERS = ("<tool_call>", "[TOOL_CALLS]")
_JSON_LINE = re.compile(r"(?:\A|\n)\s*(?:[{\[]|\Z)")  # where a line begins that may become a call


@dataclass(frozen=True)
class ScoredToken:
    """A token of an answer with its log-probability, and the likeliest tokens at its place.

    Args:
        spelling: The token's bytes, which may be a part of a character.
        logprob: Natural logarithm of its probability, before temperature and top_p.
        top: Bytes and log-probability of the likeliest tokens, the likeliest first.
        offset: Number of characters of the answer before the token.
    """

    spelling: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is new of one answer.

    Args:
        reasoning: New text of the reasoning.
        content: New text of the content.
        tokens: The tokens that have become certain, where probabilities were asked for.
        calls: The calls of tools; in the last piece only.
        finish: Why the answer ended; None: it goes on.
        count: Number of tokens generated so far.
    """

    reasoning: str = ""
    content: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    finish: FinishReason | None = None
    count: int = 0

    @property
    def empty(self) -> bool:
        return not (self.reasoning or self.content or self.finish)


class AnswerText:
    """The text of one answer while its tokens arrive.

    A text that may be the beginning of a stop text, of a call or of a character of several bytes is held back.

    Args:
        encoder: Decodes the ids.
        stops: Texts at which the answer ends; they are looked for in the content.
        splits: Separate reasoning from content; False for the continuation of a plain text.
        tools: Names of the functions on offer, whose calls are looked for; None: look for none.
    """

    def __init__(
        self, encoder: Encoder, stops: Sequence[str] = (), splits: bool = True, tools: frozenset[str] | None = None
    ) -> None:
        self.encoder, self.stops, self.splits, self.tools = encoder, tuple(stops), splits, tools
        self.ids: list[int] = []
        self.stopped = False  # a stop text was found
        self._sent = ["", ""]  # reasoning and content
        self._held: list[ScoredToken] = []
        self._length = 0  # characters of the answer, certain or not

    def push(self, token: int, scores: TokenScores | None) -> Piece:
        """Add a token; return what has become certain. After a stop text, `stopped` is True."""
        self.ids.append(token)
        if scores is not None:
            taken, *top = self.encoder.spellings([token, *(other for other, _ in scores.top)])
            logprobs = [value for _, value in scores.top]
            self._held.append(ScoredToken(taken, scores.logprob, tuple(zip(top, logprobs, strict=True)), self._length))
        reasoning, content = self.encoder.partial_answer(self.ids) if self.splits else ("", self._decoded())
        content = content.rstrip("\ufffd")  # the bytes so far end within a character
        cut = _first_stop(content, self.stops, len(self._sent[1]))
        if cut is not None:
            self.stopped, content = True, content[:cut]
        self._length = len(reasoning) + len(content)
        if not self.stopped:
            content = _without_beginning_of(content, self.stops)
            if self.tools is not None:
                content = self._before_calls(content)
        return self._piece(reasoning, content)

    def finish(self, finish: Finish) -> Piece:
        """Return the rest of the answer, with the reason of its end."""
        reasoning, content = self.encoder.split_answer(self.ids) if self.splits else ("", self._decoded())
        cut = _first_stop(content, self.stops, 0)
        if cut is not None:
            content = content[:cut]
        calls: tuple[ToolCall, ...] = ()
        if self.tools is not None and cut is None:
            text, calls = find_calls(self.encoder.spelled_answer(self.ids), content, self.tools)
            content = text if calls else content
        self._length = len(reasoning) + len(content)
        piece = self._piece(reasoning, content, last=True)
        ended: FinishReason = "length" if finish in ("length", "context") and cut is None else "stop"
        return Piece(piece.reasoning, piece.content, piece.tokens, calls, "tool_calls" if calls else ended, piece.count)

    def _decoded(self) -> str:
        return self.encoder.decode_answer(self.ids)

    def _before_calls(self, content: str) -> str:
        """Return the part of the content that cannot belong to a call."""
        spelled = self.encoder.spelled_answer(self.ids)
        if any(marker in spelled for marker in _CALL_MARKERS):
            return self._sent[1]
        line = _JSON_LINE.search(content)
        before = content if line is None else content[: line.start()]
        return max(self._sent[1], _without_beginning_of(before, _CALL_MARKERS), key=len)

    def _piece(self, reasoning: str, content: str, last: bool = False) -> Piece:
        """Return what is new in the certain reasoning and content."""
        new = [text[len(sent) :] for text, sent in zip((reasoning, content), self._sent, strict=True)]
        self._sent = [sent + text for sent, text in zip(self._sent, new, strict=True)]
        sent = sum(map(len, self._sent))
        certain = [token for token in self._held if token.offset < (self._length if last else sent)]
        if last:  # what a stop text cut off is dropped; a token without a text at the very end is not
            certain = [token for token in self._held if token.offset < self._length or not self.stopped]
        self._held = [] if last else self._held[len(certain) :]
        return Piece(new[0], new[1], tuple(certain), count=len(self.ids))


def _first_stop(text: str, stops: Sequence[str], sent: int) -> int | None:
    """Return where the first stop text begins; no stop text begins in the `sent` characters that were certain."""
    places = [place for stop in stops if (place := text.find(stop, sent)) >= 0]
    return min(places, default=None)


def _without_beginning_of(text: str, markers: Sequence[str]) -> str:
    """Return a text without the longest end that is the beginning of a marker."""
    longest = 0
    for marker in markers:
        sizes = range(min(len(marker) - 1, len(text)), 0, -1)
        longest = max(longest, next((size for size in sizes if text.endswith(marker[:size])), 0))
    return text[: len(text) - longest]
