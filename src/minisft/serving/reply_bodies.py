"""Response bodies and stream chunks in OpenAI's form, from the pieces of the answers."""

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minisft.data.conversation import ToolCall
from minisft.serving.answer_text import Piece, ScoredToken

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What all bodies of one response have in common.

    Args:
        chat: Of /v1/chat/completions, else of /v1/completions.
        model: Name of the model.
        prompt_tokens: Number of tokens of the prompts.
        scored: Probabilities were asked for.
        usage_chunk: The number of tokens was asked for in a stream.
    """

    chat: bool
    model: str
    prompt_tokens: int
    scored: bool = False
    usage_chunk: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Return the body of a response with all answers, each given by its pieces."""
        choices = [self._choice(index, pieces) for index, pieces in enumerate(answers)]
        counts = [pieces[-1].count for pieces in answers]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage(counts)}

    def first_chunk(self, index: int) -> bytes | None:
        """Return the chunk that begins an answer, if there is one."""
        if not self.chat:
            return None
        return self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, **_ENDLESS}])

    def chunks(self, index: int, piece: Piece) -> Iterable[bytes]:
        """Yield the chunks of one piece."""
        if not self.chat:
            logprobs = _text_logprobs(piece.tokens) if self.scored and piece.tokens else None
            choice = {"index": index, "text": piece.content, "logprobs": logprobs, "finish_reason": piece.finish}
            yield self._chunk([choice])
            return
        deltas: list[dict[str, Any]] = []
        if piece.reasoning:
            deltas.append({"reasoning_content": piece.reasoning})
        if piece.content or piece.tokens:
            deltas.append({"content": piece.content})
        if piece.calls:
            calls = [{"index": place, **call} for place, call in enumerate(_calls(piece.calls))]
            deltas.append({"tool_calls": calls})
        for delta in deltas:
            logprobs = _chat_logprobs(piece.tokens) if "content" in delta and piece.tokens else None
            yield self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}])
        if piece.finish:
            yield self._chunk([{"index": index, "delta": {}, "logprobs": None, "finish_reason": piece.finish}])

    def last_chunk(self, counts: Sequence[int]) -> bytes | None:
        """Return the chunk with the number of tokens, if it was asked for."""
        if not self.usage_chunk:
            return None
        return event({**self._head(self._chunk_kind), "choices": [], "usage": self.usage(counts)})

    def usage(self, counts: Sequence[int]) -> dict[str, int]:
        """Return the number of tokens of the prompts and of the answers."""
        answered = sum(counts)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": self.prompt_tokens + answered,
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": None} if self.usage_chunk else {}
        return event({**self._head(self._chunk_kind), "choices": choices, **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        reasoning, content = ("".join(getattr(piece, key) for piece in pieces) for key in ("reasoning", "content"))
        tokens = [token for piece in pieces for token in piece.tokens]
        finish, calls = pieces[-1].finish, pieces[-1].calls
        if not self.chat:
            logprobs = _text_logprobs(tokens) if self.scored else None
            return {"index": index, "text": content, "logprobs": logprobs, "finish_reason": finish}
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message |= {"content": content or None, "tool_calls": _calls(calls)}
        logprobs = _chat_logprobs(tokens) if self.scored else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


_ENDLESS = {"logprobs": None, "finish_reason": None}


def as_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8. Half of a surrogate pair, which a client may send, is escaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def event(value: Any) -> bytes:
    """Return a value as one server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


def _calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def _chat_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    entries = []
    for token in tokens:
        top = [_scored(spelling, logprob) for spelling, logprob in token.top]
        entries.append({**_scored(token.spelling, token.logprob), "top_logprobs": top})
    return {"content": entries, "refusal": None}


def _scored(spelling: bytes, logprob: float) -> dict[str, Any]:
    return {"token": spelling.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelling)}


def _text_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    return {
        "tokens": [token.spelling.decode("utf-8", "replace") for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {spelling.decode("utf-8", "replace"): logprob for spelling, logprob in reversed(token.top)}
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }
