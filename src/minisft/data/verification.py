"""Promise 2, asserted on every row that is prepared: the supervised tokens are the answers and their ends."""

from collections.abc import Sequence

import numpy as np

from minisft.data.conversation import Conversation
from minisft.data.encoder import AnswerSpan, EncodedBatch, Encoder


class VerificationError(AssertionError):
    """A row whose tokens are not what they must be: a fault of this program, never of the data."""


def verify(encoder: Encoder, conversations: Sequence[Conversation], batch: EncodedBatch) -> None:
    """Check that labels and ids say what the conversations say.

    For every row: the supervised tokens are those of the supervised answers and their terminators, these decode to
    the answers' texts (those of a cut answer, to the beginning of its text), and the system prompt stands in the
    tokens.

    Raises:
        VerificationError: they do not.
    """
    _verify_labels(conversations, batch)
    _verify_answers(encoder, conversations, batch)
    _verify_system(encoder, conversations, batch)


def _verify_labels(conversations: Sequence[Conversation], batch: EncodedBatch) -> None:
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
        if not _reads(encoder, answer, decoded):
            where = conversations[row].location
            raise VerificationError(f"{where}: the supervised tokens read {decoded!r}, the answer {answer.text!r}")


def _reads(encoder: Encoder, answer: AnswerSpan, decoded: str) -> bool:
    """Whether the decoded tokens are the answer's text, or a cut answer's beginning of it."""
    if not answer.cut:
        return decoded == answer.text or decoded == encoder.round_trip(answer.text)
    begun = decoded.rstrip("\ufffd")  # a cut may go through a character
    return answer.text.startswith(begun) or encoder.round_trip(answer.text).startswith(begun)


def _verify_system(encoder: Encoder, conversations: Sequence[Conversation], batch: EncodedBatch) -> None:
    """The system prompt stands before the first answer, or, as mistral-v3 has it, before the last."""
    wanted = [
        (row, conversation.messages[0].content.strip())
        for row, conversation in enumerate(conversations)
        if conversation.messages[0].role == "system"
    ]
    for answer in (0, -1):
        rows = [_ids_before(batch, row, answer) for row, _ in wanted]
        texts = encoder.decode_answers(rows)
        wanted = [
            (row, system)
            for (row, system), text in zip(wanted, texts, strict=True)
            if system not in text and encoder.round_trip(system).strip() not in text
        ]
    if wanted:
        raise VerificationError(f"{conversations[wanted[0][0]].location}: the system prompt is not in the tokens")


def _ids_before(batch: EncodedBatch, row: int, answer: int) -> list[int]:
    base = int(batch.offsets[row])
    return list(batch.ids[base : base + batch.answers[row][answer].start].tolist())
