"""Truncate rows above `max_length`: complete exchanges first; an answer only at its end; a prompt never."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from minisft.data.conversation import Conversation
from minisft.data.encoder import Encoded

Encode = Callable[[Conversation], Encoded]


@dataclass(frozen=True)
class Truncated:
    """A row that fits, or the reason why it is skipped.

    Args:
        conversation: The remaining conversation.
        encoded: Its tokens, at most `max_length`; None for a skipped row.
        reason: The ledger's reason for a skipped row, "" for a kept one.
        kind: "turns" where complete exchanges were removed, "cut" where an answer lost its end.
    """

    conversation: Conversation
    encoded: Encoded | None
    reason: str = ""
    kind: str = ""


def truncate(conversation: Conversation, encoded: Encoded, encode: Encode, max_length: int, overflow: str) -> Truncated:
    """Make a row that is longer than `max_length` fit, as `overflow` says.

    Args:
        conversation: The row.
        encoded: The full encoding of the row.
        encode: A function that encodes a shorter conversation.
        max_length: The largest length in tokens.
        overflow: turns | cut | drop | error.
    """
    if overflow in ("drop", "error"):
        return Truncated(conversation, None, "too_long")
    # 1. Cut the first answer that does not fit, where the recipe says so.
    complete = sum(answer.end <= max_length for answer in encoded.answers)
    if overflow == "cut" and complete < len(encoded.answers):
        truncated = _cut_in_answer(conversation, encoded.answers[complete].message, encode, max_length)
        if truncated is not None:
            return truncated
    # 2. Keep as many complete exchanges as fit.
    for answer in reversed(encoded.answers[:complete]):
        messages = conversation.messages[: answer.message + 1]
        shorter = replace(conversation, messages=messages)
        encoded_shorter = encode(shorter)
        if encoded_shorter.answers[-1].end <= max_length:  # a shorter conversation may have a longer rendering
            kept = _first_tokens(encoded_shorter, max_length)
            if not _has_loss(kept):
                return Truncated(shorter, None, "nothing_left_to_learn")
            return Truncated(shorter, kept, kind="turns" if len(messages) < len(conversation.messages) else "")
    # 3. Not even the first one fits: cut its answer.
    if encoded.answers:
        truncated = _cut_in_answer(conversation, encoded.answers[0].message, encode, max_length)
        if truncated is not None:
            return truncated
    return Truncated(conversation, None, "nothing_left_to_learn")


def _cut_in_answer(conversation: Conversation, last: int, encode: Encode, max_length: int) -> Truncated | None:
    """Return the conversation up to message `last`, with that answer cut at its end; None where no part of it fits."""
    part = replace(conversation, messages=conversation.messages[: last + 1])
    encoded = encode(part)
    answer = encoded.answers[-1]
    if answer.start >= max_length:
        return None
    short = _first_tokens(encoded, max_length)
    kind = "cut" if answer.end > max_length else "turns"
    return Truncated(part, short, kind=kind) if _has_loss(short) else Truncated(part, None, "nothing_left_to_learn")


def _first_tokens(encoded: Encoded, count: int) -> Encoded:
    answers = tuple(
        answer if answer.end <= count else replace(answer, end=count, terminated=False, cut=True)
        for answer in encoded.answers
        if answer.start < count
    )
    return Encoded(encoded.input_ids[:count], encoded.labels[:count], answers, encoded.findings)


def _has_loss(encoded: Encoded) -> bool:
    return any(label >= 0 for label in encoded.labels)
