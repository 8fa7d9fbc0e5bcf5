"""Evaluation examples: prompts and references of the held-out rows, and prompts of the user's own."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minisft.data.conversation import Message, message_from_row
from minisft.data.encoder import IGNORED, Encoder
from minisft.data.prepared import load_test, load_train
from minisft.data.renderers.base import RefusedError
from minisft.errors import UserError
from minisft.files import read_json


@dataclass(frozen=True)
class EvalExample:
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
class HeldOutSet:
    """The held-out rows.

    Args:
        examples: what is to be answered.
        rows: (input ids, labels) of every row, for the loss.
        conversations: how many of the rows are asked something; with `turns: all` they are fewer than the questions.
    """

    examples: list[EvalExample]
    rows: list[tuple[list[int], list[int]]]
    conversations: int

    @cached_property
    def rows_fingerprint(self) -> str:
        """A hash of the rows."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:24]


def load_held_out(
    output: Path, encoder: Encoder, turns: str, limit: int | None, *, required: bool = True
) -> HeldOutSet:
    """The questions of `<output>/dataset/test`.

    Args:
        output: the run folder.
        encoder: of the run's template.
        turns: "last" or "all" answers of a conversation.
        limit: conversations, None for all.
        required: it is an error if there are none.

    Raises:
        UserError: the data is not prepared, there are no held-out rows, or the template refuses a prompt.
    """
    rows = load_test(output)[:limit] if _count_test_rows(output) else []
    if required and not rows:
        raise UserError(
            output / "dataset" / "test",
            "there are no held-out conversations to evaluate on",
            "set evaluation.prompts to have prompts of your own answered, or train anew with data.test_fraction above "
            "0, or with data.test",
        )
    asked = [list(_examples_of(row, encoder, turns)) for row in rows]
    return HeldOutSet(
        [example for examples in asked for example in examples],
        [(list(row["input_ids"]), list(row["labels"])) for row in rows],
        sum(bool(examples) for examples in asked),
    )


def load_prompts(given: str | list[str] | None, encoder: Encoder) -> list[EvalExample]:
    """The user's own prompts, as questions without a reference.

    Args:
        given: the recipe's `evaluation.prompts`: texts; or a file, of a prompt a line (.txt) or of lines
            {"messages": [{"role", "content"}, ...]} (.jsonl); or None.
        encoder: of the run's template.

    Raises:
        UserError: the file cannot be read, a line holds no conversation that ends in a user's message, or the
            template refuses one.
    """
    if given is None:
        return []
    if isinstance(given, str):
        conversations = _read_prompts(Path(given))
    else:
        conversations = [(f"evaluation.prompts, text {n}", [Message("user", t)]) for n, t in enumerate(given, 1)]
    return [_prompt(n, where, messages, encoder) for n, (where, messages) in enumerate(conversations, 1)]


def _prompt(number: int, where: str, messages: list[Message], encoder: Encoder) -> EvalExample:
    try:
        ids = encoder.encode_prompt(messages)
    except RefusedError as refusal:
        raise UserError(where, refusal.problem, "say it otherwise, or use another data.template") from None
    turn = sum(message.is_answer for message in messages) + 1
    return EvalExample(f"prompt-{number}", turn, ids, str(encoder.tokenizer.decode(ids, skip_special_tokens=False)), "")


def _read_prompts(path: Path) -> list[tuple[str, list[Message]]]:
    """(place, messages) of each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fix = "give a list of texts, or the path of a .txt or .jsonl file"
        raise UserError("evaluation.prompts", f"{path} cannot be read ({error})", fix) from None
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(path, "there is no prompt in this file", "write one a line")
    if path.suffix != ".jsonl":
        return [(where, [Message("user", line.rstrip("\r"))]) for where, line in numbered]
    return [(where, _messages_of(where, line)) for where, line in numbered]


def _messages_of(where: str, line: str) -> list[Message]:
    fix = 'write {"messages": [{"role": "user", "content": "..."}]} in one line'
    try:
        messages = [message_from_row(fields) for fields in json.loads(line)["messages"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(where, f"this is no prompt ({type(error).__name__}: {error})", fix) from None
    if not messages or messages[-1].is_answer or not all(isinstance(message.content, str) for message in messages):
        raise UserError(where, "the last message must be one to be answered, and contents must be text", fix)
    return messages


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
    fix = f"delete {ledger.parent} and run `minisft inspect {output}`, which prepares the data again"
    rows = read_json(ledger, fix, rows=dict)["rows"]
    if not isinstance(rows.get("test"), int):
        raise UserError(ledger, "this file is damaged (it does not say how many rows are held out)", fix)
    return int(rows["test"])


def _examples_of(row: dict[str, Any], encoder: Encoder, turns: str) -> Iterable[EvalExample]:
    messages = [message_from_row(fields) for fields in row["messages"]]
    answers = [place for place, message in enumerate(messages) if message.is_answer]
    wanted = [place for place in answers if messages[place].supervised]
    for place in wanted[-1:] if turns == "last" else wanted:
        try:
            ids = encoder.encode_prompt(messages[:place], row.get("tools") or "")
        except RefusedError as refusal:
            where, fix = f"held-out row {row['id']}", "use another data.template, or take the row out of the data"
            raise UserError(where, refusal.problem, fix) from None
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        yield EvalExample(str(row["id"]), answers.index(place) + 1, ids, str(text), messages[place].text)


def _supervised_runs(labels: Sequence[int], stops: set[int]) -> Iterable[list[int]]:
    """The answers' ids, without their terminators: stretches of labels that are not ignored."""
    array = np.asarray(labels)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], array != IGNORED, [False]]).astype(int)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        run = array[start:end].tolist()
        yield run[: next((place for place, token in enumerate(run) if token in stops), len(run))]
