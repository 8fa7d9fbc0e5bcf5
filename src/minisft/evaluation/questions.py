"""What is asked of every model: prompts and references out of the held-out rows, and the train answers."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minisft.data.conversation import message_from_row
from minisft.data.encoding import IGNORED, Encoder
from minisft.data.preparation import load_test, load_train
from minisft.data.rendering import RefusedError
from minisft.errors import UserError


@dataclass(frozen=True)
class Question:
    """One held-out answer to be given.

    Args:
        id: the row's id.
        turn: which answer of its conversation, from 1.
        prompt_ids: the conversation up to the answer, as training rendered it; earlier answers are the data's own.
        prompt: the same as text.
        reference: the data's answer.
    """

    id: str
    turn: int
    prompt_ids: list[int]
    prompt: str
    reference: str


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows.

    Args:
        questions: what is to be answered.
        rows: (input ids, labels) of every row, for the loss.
    """

    questions: list[Question]
    rows: list[tuple[list[int], list[int]]]

    def fingerprint(self) -> str:
        """A hash of everything here."""
        content = json.dumps([[asdict(q) for q in self.questions], self.rows])
        return hashlib.sha256(content.encode()).hexdigest()


def load_held_out(output: Path, encoder: Encoder, turns: str, limit: int | None) -> HeldOut:
    """The questions of `<output>/dataset/test`.

    Args:
        output: the run folder.
        encoder: of the run's template.
        turns: "last" or "all" answers of a conversation.
        limit: conversations, None for all.

    Raises:
        UserError: the data is not prepared, there are no held-out rows, or the template refuses a prompt.
    """
    rows = load_test(output)[:limit] if _count_test_rows(output) else []
    if not rows:
        raise UserError(
            output / "dataset" / "test",
            "there are no held-out conversations to evaluate on",
            "set data.test_fraction above 0, or data.test, and train anew",
        )
    questions = [question for row in rows for question in _questions_of(row, encoder, turns)]
    return HeldOut(questions, [(list(row["input_ids"]), list(row["labels"])) for row in rows])


def train_answers(output: Path, encoder: Encoder, turns: str) -> list[str]:
    """The supervised answers of `<output>/dataset/train`, as text: the last or all of each conversation."""
    answers: list[list[int]] = []
    stops = set(encoder.stop_token_ids)
    for labels in load_train(output)["labels"]:
        runs = list(_supervised_runs(labels, stops))
        answers += runs[-1:] if turns == "last" else runs
    return encoder.decode_answers(answers) if answers else []


def _count_test_rows(output: Path) -> int:
    ledger = output / "dataset" / "ledger.json"
    if not ledger.is_file():
        raise UserError(ledger.parent, "there is no prepared data", "train first: minisft train")
    return int(json.loads(ledger.read_text(encoding="utf-8"))["rows"]["test"])


def _questions_of(row: dict[str, Any], encoder: Encoder, turns: str) -> Iterable[Question]:
    messages = [message_from_row(fields) for fields in row["messages"]]
    answers = [place for place, message in enumerate(messages) if message.is_answer]
    wanted = [place for place in answers if messages[place].supervised]
    for place in wanted[-1:] if turns == "last" else wanted:
        try:
            ids = encoder.encode_prompt(messages[:place], row.get("tools") or "")
        except RefusedError as refusal:
            where, mend = f"held-out row {row['id']}", "use another data.template, or take the row out of the data"
            raise UserError(where, refusal.what, mend) from None
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        yield Question(str(row["id"]), answers.index(place) + 1, ids, str(text), messages[place].text)


def _supervised_runs(labels: Sequence[int], stops: set[int]) -> Iterable[list[int]]:
    """The answers' ids, without their terminators: stretches of labels that are not ignored."""
    array = np.asarray(labels)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], array != IGNORED, [False]]).astype(int)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        run = array[start:end].tolist()
        yield run[: next((place for place, token in enumerate(run) if token in stops), len(run))]
