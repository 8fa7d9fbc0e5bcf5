"""What happens past `max_length`: whole exchanges first; an answer is cut only at its end; a prompt never."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from minisft.data.conversation import Conversation
from minisft.data.encoder import AnswerSpan, Encoded

Encode = Callable[[Conversation], Encoded]


@dataclass(frozen=True)
class Fitted:
    """A row that fits, or None with the reason why none does.

    Args:
        conversation: what is left of it.
        encoded: its tokens, at most `max_length`.
        reason: the ledger's reason for a skipped row, "" for a kept one.
        kind: "turns" where whole exchanges went, "cut" where an answer lost its end.
    """

    conversation: Conversation
    encoded: Encoded | None
    reason: str = ""
    kind: str = ""


def fit(conversation: Conversation, encoded: Encoded, encode: Encode, max_length: int, overflow: str) -> Fitted:
    """Make a row that is longer than `max_length` fit, as `overflow` says.

    Args:
        conversation: the row.
        encoded: its full encoding.
        encode: encodes a shorter conversation.
        max_length: in tokens.
        overflow: turns | cut | drop | error.
    """
    if overflow in ("drop", "error"):
        return Fitted(conversation, None, "too_long")
    whole = sum(answer.end <= max_length for answer in encoded.answers)
    if overflow == "cut" and whole < len(encoded.answers):
        fitted = _cut_in_answer(conversation, encoded.answers[whole].message, encode, max_length)
        if fitted is not None:
            return fitted
    for count in range(whole, 0, -1):
        fitted = _keep_whole(conversation, encoded.answers[count - 1].message, encode, max_length)
        if fitted is not None:
            return fitted
    if encoded.answers:
        fitted = _cut_in_answer(conversation, encoded.answers[0].message, encode, max_length)
        if fitted is not None:
            return fitted
    return Fitted(conversation, None, "nothing_left_to_learn")


def _keep_whole(conversation: Conversation, last: int, encode: Encode, max_length: int) -> Fitted | None:
    """The conversation up to and with message `last`, if its last answer ends within `max_length`."""
    part = replace(conversation, messages=conversation.messages[: last + 1])
    encoded = encode(part)
    if encoded.answers[-1].end > max_length:
        return None
    short = _first_tokens(encoded, max_length)
    if not _learns(short):
        return Fitted(part, None, "nothing_left_to_learn")
    return Fitted(part, short, kind="turns" if last + 1 < len(conversation.messages) else "")


def _cut_in_answer(conversation: Conversation, last: int, encode: Encode, max_length: int) -> Fitted | None:
    """The conversation up to message `last`, that answer cut at its end, if something of it fits."""
    part = replace(conversation, messages=conversation.messages[: last + 1])
    encoded = encode(part)
    answer = encoded.answers[-1]
    if answer.start >= max_length:
        return None
    short = _first_tokens(encoded, max_length)
    kind = "cut" if answer.end > max_length else "turns"
    return Fitted(part, short, kind=kind) if _learns(short) else Fitted(part, None, "nothing_left_to_learn")


def _first_tokens(encoded: Encoded, count: int) -> Encoded:
    answers = tuple(_shorten(answer, count) for answer in encoded.answers if answer.start < count)
    return Encoded(encoded.input_ids[:count], encoded.labels[:count], answers, encoded.findings)


def _shorten(answer: AnswerSpan, count: int) -> AnswerSpan:
    return answer if answer.end <= count else replace(answer, end=count, terminated=False, cut=True)


def _learns(encoded: Encoded) -> bool:
    return any(label >= 0 for label in encoded.labels)
