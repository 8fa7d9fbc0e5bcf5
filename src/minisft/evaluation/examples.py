"""Evaluation examples: prompts and references of the held-out rows, and the user's own prompts."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
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
    """One answer of a held-out conversation, which the models are to generate.

    Args:
        id: Id of the row.
        turn: Number of the answer in its conversation, from 1.
        prompt_ids: Token ids of the conversation up to the answer, as training rendered it, with the earlier answers
            of the data.
        prompt: The same as text.
        reference: The answer of the data.
        messages: The messages before the answer.
        tools: The functions on offer as a JSON list, or "".
        test_set: Name of its test set; "" where `data.test` names no sets.
    """

    id: str
    turn: int
    prompt_ids: list[int]
    prompt: str
    reference: str
    messages: tuple[Message, ...] = ()
    tools: str = ""
    test_set: str = ""


@dataclass(frozen=True)
class HeldOutSet:
    """The held-out rows.

    Args:
        examples: The answers to generate.
        rows: (input ids, labels) of every row, for the loss.
        conversations: Number of conversations that have an example; `turns: all` gives several examples of each.
        test_sets: The test sets that `data.test` names, one after the other as in `examples` and `rows`; {} if it names
            none.
    """

    examples: list[EvalExample]
    rows: list[tuple[list[int], list[int]]]
    conversations: int
    test_sets: "dict[str, HeldOutSet]" = field(default_factory=dict)

    @property
    def first(self) -> "HeldOutSet":
        """The first test set; all rows if there are no sets."""
        return next(iter(self.test_sets.values()), self)

    @cached_property
    def supervised(self) -> int:
        """Number of tokens that the loss is a mean of."""
        return sum(sum(label != IGNORED for label in labels[1:]) for _, labels in self.rows)

    @cached_property
    def rows_fingerprint(self) -> str:
        """Hash of the rows."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:24]


def load_held_out(
    output: Path, encoder: Encoder, turns: str, limit: int | None, *, required: bool = True
) -> HeldOutSet:
    """Load the examples of `<output>/dataset/test`.

    Args:
        output: The run folder.
        encoder: Encoder of the run's template.
        turns: "last" or "all" answers of a conversation.
        limit: The most conversations to load, of each test set; None: all.
        required: Raise an error if there are no held-out rows.

    Raises:
        UserError: The data is not prepared, its ledger is damaged, there are no held-out rows, or the template refuses
            a prompt.
    """
    ledger = output / "dataset" / "ledger.json"
    if not ledger.is_file():
        raise UserError(ledger.parent, "there is no prepared data", "train first: minisft train")
    fix = f"delete {ledger.parent} and run `minisft inspect {output}`, which prepares the data again"
    counts = read_json(ledger, fix, rows=dict)["rows"]
    if not isinstance(counts.get("test"), int):
        raise UserError(ledger, "this file is damaged (it does not say how many rows are held out)", fix)
    all_rows = load_test(output) if counts["test"] else []
    if required and not all_rows:
        raise UserError(
            output / "dataset" / "test",
            "there are no held-out conversations to evaluate on",
            "set evaluation.prompts to have your own prompts answered, or train again with data.test_fraction above "
            "0, or with data.test",
        )
    sets = {
        name: _held_out(_first_conversations(list(rows), limit), encoder, turns)
        for name, rows in groupby(all_rows, key=lambda row: str(row.get("test_set") or ""))
    }
    if list(sets) in ([], [""]):
        return sets.get("", HeldOutSet([], [], 0))
    return HeldOutSet(
        [example for one in sets.values() for example in one.examples],
        [row for one in sets.values() for row in one.rows],
        sum(one.conversations for one in sets.values()),
        sets,
    )


def _held_out(rows: Sequence[dict[str, Any]], encoder: Encoder, turns: str) -> HeldOutSet:
    examples_by_row = [list(_examples_of(row, encoder, turns)) for row in rows]
    return HeldOutSet(
        [example for examples in examples_by_row for example in examples],
        [(list(row["input_ids"]), list(row["labels"])) for row in rows],
        sum(bool(examples) for examples in examples_by_row),
    )


def load_prompts(given: str | list[str] | None, encoder: Encoder) -> list[EvalExample]:
    """Load the user's own prompts, as examples without a reference.

    Args:
        given: The recipe's `evaluation.prompts`: texts; or the path of a file with one prompt per line (.txt) or with
            lines {"messages": [{"role", "content"}, ...]} (.jsonl); or None.
        encoder: Encoder of the run's template.

    Raises:
        UserError: The file cannot be read, a line holds no conversation that ends with a user's message, or the
            template refuses one.
    """
    if given is None:
        return []
    if isinstance(given, str):
        conversations = _read_prompts(Path(given))
    else:
        conversations = [(f"evaluation.prompts, text {n}", [Message("user", t)]) for n, t in enumerate(given, 1)]
    examples = []
    for number, (where, messages) in enumerate(conversations, 1):
        try:
            ids = encoder.encode_prompt(messages)
        except RefusedError as refusal:
            raise UserError(where, refusal.problem, "change the prompt, or use another data.template") from None
        turn = sum(message.is_answer for message in messages) + 1
        text = str(encoder.tokenizer.decode(ids, skip_special_tokens=False))
        examples.append(EvalExample(f"prompt-{number}", turn, ids, text, "", tuple(messages)))
    return examples


def _read_prompts(path: Path) -> list[tuple[str, list[Message]]]:
    """Return (`path:line`, messages) of each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fix = "give a list of texts, or the path of a .txt or .jsonl file"
        raise UserError("evaluation.prompts", f"{path} cannot be read ({error})", fix) from None
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(path, "there is no prompt in this file", "write one prompt per line")
    if path.suffix != ".jsonl":
        return [(where, [Message("user", line.rstrip("\r"))]) for where, line in numbered]
    conversations = []
    fix = 'write {"messages": [{"role": "user", "content": "..."}]} in one line'
    for where, line in numbered:
        try:
            messages = [message_from_row(fields) for fields in json.loads(line)["messages"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(where, f"this line is not a prompt ({type(error).__name__}: {error})", fix) from None
        if not messages or messages[-1].is_answer or not all(isinstance(message.content, str) for message in messages):
            problem = "the last message is an assistant's, there is no message, or a content is not text"
            raise UserError(where, problem, fix)
        conversations.append((where, messages))
    return conversations


def _first_conversations(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """Return the rows of the first `limit` conversations; the messages are in the last row of each."""
    ends = [place + 1 for place, row in enumerate(rows) if row["messages"] is not None]
    return rows if limit is None or limit >= len(ends) else rows[: ends[limit - 1]]


def train_answers(output: Path, encoder: Encoder, turns: str) -> list[str]:
    """Return the supervised answers of `<output>/dataset/train` as text: the last or all of each conversation."""
    data = load_train(output)
    stops = set(encoder.stop_token_ids)
    # The answers of a conversation that has one row per answer are in the rows of the same number.
    answers: dict[int, list[list[int]]] = {}
    numbers = data["conversation"] if "conversation" in data.column_names else range(len(data))
    for number, labels in zip(numbers, data["labels"], strict=True):
        answers.setdefault(number, []).extend(_supervised_runs(labels, stops))
    wanted = [run for runs in answers.values() for run in (runs[-1:] if turns == "last" else runs)]
    return encoder.final_texts(wanted)


def _examples_of(row: dict[str, Any], encoder: Encoder, turns: str) -> Iterable[EvalExample]:
    if row["messages"] is None:
        return
    messages = [message_from_row(fields) for fields in row["messages"]]
    answers = [place for place, message in enumerate(messages) if message.is_answer]
    wanted = [place for place in answers if messages[place].supervised]
    tools = row.get("tools") or ""
    for place in wanted[-1:] if turns == "last" else wanted:
        before = tuple(messages[:place])
        try:
            ids = encoder.encode_prompt(before, tools)
        except RefusedError as refusal:
            where, fix = f"held-out row {row['id']}", "use another data.template, or remove the row from the data"
            raise UserError(where, refusal.problem, fix) from None
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        turn, reference = answers.index(place) + 1, encoder.final_answer(messages[place])
        test_set = str(row.get("test_set") or "")
        yield EvalExample(str(row["id"]), turn, ids, str(text), reference, before, tools, test_set)


def _supervised_runs(labels: Sequence[int], stops: set[int]) -> Iterable[list[int]]:
    """Yield each answer's ids without its terminator: the runs of labels that are not ignored."""
    array = np.asarray(labels)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], array != IGNORED, [False]]).astype(int)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        run = array[start:end].tolist()
        yield run[: next((place for place, token in enumerate(run) if token in stops), len(run))]
