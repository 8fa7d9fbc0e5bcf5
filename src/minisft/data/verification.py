"""Verify every row that is prepared: the supervised tokens are the answers and their terminators (promise 2)."""

from collections.abc import Sequence

import numpy as np

from minisft.data.conversation import Conversation
from minisft.data.encoder import EncodedBatch, Encoder


class VerificationError(AssertionError):
    """The tokens of a row are wrong: a fault of this program, never of the data."""


def verify(encoder: Encoder, conversations: Sequence[Conversation], batch: EncodedBatch) -> None:
    """Check the ids and labels of rows against their conversations.

    For every row: the supervised tokens are those of the supervised answers and their terminators, these decode to
    the answers' texts (those of a cut answer, to the beginning of its text), and the tokens hold the system prompt.

    Raises:
        VerificationError: A row fails one of these checks.
    """
    _verify_labels(conversations, batch)
    _verify_answers(encoder, conversations, batch)
    _verify_system(encoder, conversations, batch)


def _verify_labels(conversations: Sequence[Conversation], batch: EncodedBatch) -> None:
    """Check that exactly the tokens of supervised answers have a label, and that it is their id."""
    supervised = batch.labels != -100
    if not np.array_equal(batch.labels[supervised], batch.ids[supervised]):
        raise VerificationError("a label is not the id at its place")
    expected = np.zeros(len(batch.ids), dtype=bool)
    for row, answers in enumerate(batch.answers):
        base = int(batch.offsets[row])
        for answer in answers:
            if answer.supervised:
                expected[base + answer.start : base + answer.end] = True
    wrong = np.flatnonzero(expected != supervised)
    if len(wrong):
        row = int(np.searchsorted(batch.offsets, wrong[0], side="right")) - 1
        raise VerificationError(f"{conversations[row].location}: tokens outside the answers are supervised")


def _verify_answers(encoder: Encoder, conversations: Sequence[Conversation], batch: EncodedBatch) -> None:
    """Check that supervised answers end with a terminator and decode to their text, cut ones to its beginning."""
    stops = set(encoder.stop_token_ids)
    places, rows = [], []
    for row, answers in enumerate(batch.answers):
        base = int(batch.offsets[row])
        for answer in answers:
            if not answer.supervised:
                continue
            ids = batch.ids[base + answer.start : base + answer.end].tolist()
            if answer.terminated and ids.pop() not in stops:
                raise VerificationError(f"{conversations[row].location}: an answer lacks its terminator")
            places.append((row, answer))
            rows.append(ids)
    for (row, answer), decoded in zip(places, encoder.decode_answers(rows), strict=True):
        if answer.cut:
            beginning = decoded.rstrip("\ufffd")  # the cut may go through a character
            agrees = answer.text.startswith(beginning) or encoder.round_trip(answer.text).startswith(beginning)
        else:
            agrees = decoded == answer.text or decoded == encoder.round_trip(answer.text)
        if not agrees:
            where = conversations[row].location
            raise VerificationError(f"{where}: the supervised tokens read {decoded!r}, the answer {answer.text!r}")


def _verify_system(encoder: Encoder, conversations: Sequence[Conversation], batch: EncodedBatch) -> None:
    """Check that the system prompt is before the first answer, or before the last, where mistral-v3 and v2 put it."""
    wanted = [
        (row, conversation.messages[0].content.strip())
        for row, conversation in enumerate(conversations)
        if conversation.messages[0].role == "system"
    ]
    for answer in (0, -1):
        starts = [(int(batch.offsets[row]), batch.answers[row][answer].start) for row, _ in wanted]
        rows = [batch.ids[start : start + length].tolist() for start, length in starts]
        texts = encoder.decode_answers(rows)
        wanted = [
            (row, system)
            for (row, system), text in zip(wanted, texts, strict=True)
            if system not in text and encoder.round_trip(system).strip() not in text
        ]
    if wanted:
        raise VerificationError(f"{conversations[wanted[0][0]].location}: the system prompt is not in the tokens")
