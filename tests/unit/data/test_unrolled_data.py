"""Data sets in which a conversation has one row per answer: the ledger, the split, the columns and what reads them."""

import datasets
import pytest

from minisft.data.encoder import Encoder
from minisft.data.inspect import choose_rows, read_row
from minisft.data.prepared import load_split, load_test
from minisft.errors import UserError
from minisft.evaluation.examples import load_held_out, train_answers
from tests.unit.data.helpers import prepare_source, write_rows
from tests.unit.data.test_published_templates import FOLDER, STUBS
from tests.unit.data.toys import bpe_tokenizer

QWEN3 = str(FOLDER / "qwen3.jinja")
PLAIN = str(FOLDER / "smollm2.jinja")


def thinker():
    return bpe_tokenizer(**STUBS["qwen3"])


def talk(number, turns, **extra):
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{number}: {turn} + {turn}?"})
        answer = {"role": "assistant", "content": f"It is {2 * turn}.", "reasoning_content": f"Twice {turn}."}
        messages.append({**answer, **extra})
    return {"messages": messages, "id": f"talk-{number}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unrolled")
    source = write_rows(folder / "talks.jsonl", [talk(number, 1 + number % 3) for number in range(30)])
    return prepare_source(source, folder / "run", thinker(), template=QWEN3, test_fraction=0.2)


def test_rows_of_the_ledger_count_conversations_and_unrolled_counts_rows(prepared):
    ledger, run = prepared.ledger, prepared.folder.parent
    assert ledger["rows"]["read"] == 30 == ledger["rows"]["train"] + ledger["rows"]["test"]
    assert ledger["turns"] == {"user": 60, "assistant": 60, "supervised": 60}
    unrolled = ledger["unrolled"]
    assert unrolled["conversations"] == 20  # those of two and of three answers
    for split in ("train", "test"):
        assert len(datasets.load_from_disk(str(prepared.folder / split))) == unrolled["rows"][split]
    assert unrolled["rows"]["train"] + unrolled["rows"]["test"] == 60
    assert unrolled["tokens_before"] < unrolled["tokens_after"]
    assert unrolled["answers_left_out"] == 0
    rows = [row for split in ("train", "test") for row in load_split(run, split)]
    assert ledger["tokens"]["kept"] == sum(len(row["input_ids"]) for row in rows)
    assert ledger["tokens"]["supervised"] == sum(label >= 0 for row in rows for label in row["labels"])
    assert "reasoning_dropped" not in ledger["findings"]


def test_all_rows_of_a_conversation_stand_on_one_side_and_the_last_test_row_has_the_messages(prepared):
    run = prepared.folder.parent
    train, test = (load_split(run, split) for split in ("train", "test"))
    assert not set(train["conversation"]) & set(test["conversation"])
    assert len(set(test["conversation"])) == prepared.ledger["rows"]["test"]
    by_conversation: dict[int, list] = {}
    for row in test:
        by_conversation.setdefault(row["conversation"], []).append(row)
    for rows in by_conversation.values():
        *earlier, last = rows
        assert all(row["messages"] is None for row in earlier)
        assert len(last["messages"]) == 2 * len(rows)
        assert all(message["supervised"] for message in last["messages"] if message["role"] == "assistant")
        assert [row["answer"] for row in rows] == ([None] if len(rows) == 1 else list(range(1, len(rows) + 1)))


def test_the_split_takes_its_share_of_the_conversations(prepared):
    assert prepared.ledger["rows"]["test"] == 6


def test_evaluation_asks_each_answer_once_behind_the_prompt_of_its_row(prepared):
    run, encoder = prepared.folder.parent, Encoder(thinker(), QWEN3)
    rows = load_test(run)
    every = load_held_out(run, encoder, "all", None)
    assert every.conversations == prepared.ledger["rows"]["test"]
    assert len(every.examples) == len(rows) == len(every.rows)
    for example, row in zip(every.examples, rows, strict=True):
        assert example.prompt_ids == row["input_ids"][: len(example.prompt_ids)]
        assert row["labels"][len(example.prompt_ids)] >= 0
        assert row["labels"][len(example.prompt_ids) - 1] < 0
        assert example.reference.startswith("It is")
    last = load_held_out(run, encoder, "last", 2)
    assert last.conversations == len(last.examples) == 2
    assert len(last.rows) == sum(len(row) for row in list(groups(rows).values())[:2])
    answers = train_answers(run, encoder, "last")
    assert len(answers) == prepared.ledger["rows"]["train"]
    assert set(answers) <= {"It is 0.", "It is 2.", "It is 4."}


def groups(rows):
    found: dict[int, list] = {}
    for row in rows:
        found.setdefault(row["conversation"], []).append(row)
    return found


def test_inspect_shows_every_row_of_a_conversation(prepared):
    data = load_split(prepared.folder.parent, "train")
    name = next(row["id"] for row in data if row["answer"] == 2)
    shown = [read_row(data, "train", row, thinker()) for row in choose_rows(data, ids=[name])]
    assert len(shown) >= 2
    assert [f"answer {number}" in row.title for number, row in enumerate(shown, 1)] == [True] * len(shown)


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_data_of_which_no_answer_is_written_otherwise_are_as_they_were(tmp_path, mode):
    source = write_rows(tmp_path / "talks.jsonl", [talk(number, 2, reasoning_content=None) for number in range(8)])
    made = prepare_source(source, tmp_path / "run", thinker(), template=PLAIN, unroll=mode)
    assert "unrolled" not in made.ledger
    assert not {"conversation", "answer"} & set(load_split(tmp_path / "run", "train").column_names)


def test_never_counts_the_answers_that_it_leaves_out(tmp_path):
    source = write_rows(tmp_path / "talks.jsonl", [talk(number, 3) for number in range(8)])
    made = prepare_source(source, tmp_path / "run", thinker(), template=QWEN3, unroll="never")
    unrolled = made.ledger["unrolled"]
    assert unrolled["conversations"] == 0
    assert unrolled["answers_left_out"] == 16
    assert made.ledger["turns"]["supervised"] == 8
    assert unrolled["rows"] == {split: made.ledger["rows"][split] for split in ("train", "test")}


def test_always_gives_every_answer_its_row(tmp_path):
    source = write_rows(tmp_path / "talks.jsonl", [talk(number, 2, reasoning_content=None) for number in range(8)])
    made = prepare_source(source, tmp_path / "run", thinker(), template=PLAIN, unroll="always")
    assert made.ledger["unrolled"]["conversations"] == 8
    assert sum(made.ledger["unrolled"]["rows"].values()) == 16


def test_train_on_last_never_unrolls(tmp_path):
    source = write_rows(tmp_path / "talks.jsonl", [talk(number, 3) for number in range(8)])
    made = prepare_source(source, tmp_path / "run", thinker(), template=QWEN3, train_on="last", unroll="always")
    assert "unrolled" not in made.ledger
    assert made.ledger["turns"]["supervised"] == 8


def test_a_conversation_stays_with_the_rows_that_fit(tmp_path):
    rows = [talk(number, 3) for number in range(8)]
    whole = prepare_source(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "whole", thinker(), template=QWEN3)
    lengths = sorted(len(row["input_ids"]) for row in load_split(tmp_path / "whole", "train") if row["answer"] == 2)
    cut = prepare_source(
        write_rows(tmp_path / "b.jsonl", rows), tmp_path / "cut", thinker(), template=QWEN3, max_length=lengths[-1]
    )
    assert cut.ledger["rows"] == whole.ledger["rows"]
    assert sum(cut.ledger["unrolled"]["rows"].values()) == 16
    assert cut.ledger["overflow"]["turns"] == 8
    assert cut.ledger["turns"]["dropped"] == 16
    assert cut.ledger["turns"]["supervised"] == 16
    for row in load_test(tmp_path / "cut"):
        assert row["messages"] is None or len(row["messages"]) == 4
    with pytest.raises(UserError) as stopped:
        prepare_source(
            tmp_path / "b.jsonl", tmp_path / "stop", thinker(), template=QWEN3, max_length=lengths[-1], overflow="error"
        )
    assert "too_long 8" in stopped.value.problem


def test_prompt_differs_is_counted_for_the_system_prompt_of_a_moving_template(tmp_path):
    template = tmp_path / "moving.jinja"
    template.write_text(
        "{%- set last = messages | selectattr('role', 'equalto', 'user') | list | length %}{%- set seen = namespace(n=0) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set seen.n = seen.n + 1 %}"
        "{{- '<|im_start|>' + (messages[0].content + '|' if seen.n == last and messages[0].role == 'system' else '') + m.content }}"
        "{%- elif m.role == 'assistant' %}{{- '<think>' + m.content + '<|im_end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<think>' }}{%- endif %}"
    )
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, *talk(n, 2, reasoning_content=None)["messages"]]}
        for n in range(8)
    ]
    made = prepare_source(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "run", thinker(), template=str(template))
    assert made.ledger["findings"]["prompt_differs"] == 8
    assert "unrolled" not in made.ledger


def test_an_answer_behind_switched_off_thinking_is_refused_with_its_place(tmp_path):
    source = write_rows(tmp_path / "talks.jsonl", [talk(number, 2) for number in range(8)])
    with pytest.raises(UserError) as refusal:
        prepare_source(source, tmp_path / "run", thinker(), template=QWEN3, template_options={"enable_thinking": False})
    assert "prompt_not_prefix 8" in refusal.value.problem
    assert "talks.jsonl:1: the template's prompt for the last answer" in refusal.value.problem
    assert "…" in refusal.value.problem
    assert refusal.value.problem.isprintable() or "\n" in refusal.value.problem
