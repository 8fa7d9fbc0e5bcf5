"""The shipped demo conversations: made by their generator, valid, and without repeats."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"

Row = dict[str, Any]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = RECIPES / "make_demo_conversations.py"
    spec = importlib.util.spec_from_file_location("make_demo_conversations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    text = (RECIPES / "demo.sharegpt.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def talks(rows: list[Row]) -> Iterator[tuple[list[str], list[str], list[str]]]:
    """Each dialogue as (system texts, the speakers that follow, their words)."""
    for row in rows:
        turns = row["conversations"]
        spoken = [turn for turn in turns if turn["from"] != "system"]
        notes = [turn["value"] for turn in turns if turn["from"] == "system"]
        yield notes, [turn["from"] for turn in spoken], [turn["value"] for turn in spoken]


def test_the_committed_file_is_what_the_generator_makes(generator: ModuleType) -> None:
    assert (RECIPES / "demo.sharegpt.jsonl").read_bytes() == generator.make_file()


def test_another_seed_makes_other_conversations(generator: ModuleType) -> None:
    assert generator.make_dialogues(count=5, seed=1) != generator.make_dialogues(count=5, seed=2)


def test_there_are_enough_conversations_of_two_to_eight_turns(rows: list[Row]) -> None:
    lengths = [len(row["conversations"]) for row in rows]
    assert len(rows) >= 400
    assert min(lengths) == 2
    assert max(lengths) <= 8
    assert sum(length > 3 for length in lengths) >= 150


def test_some_conversations_begin_with_a_system_prompt(rows: list[Row]) -> None:
    with_note = [row for row in rows if row["conversations"][0]["from"] == "system"]
    assert 50 <= len(with_note) <= len(rows) / 2
    assert all(len(notes) <= 1 for notes, _, _ in talks(rows))


def test_customer_and_desk_alternate_and_the_desk_ends(rows: list[Row]) -> None:
    for _, speakers, _ in talks(rows):
        assert len(speakers) % 2 == 0
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)


def test_no_text_is_empty_or_padded(rows: list[Row]) -> None:
    for row in rows:
        assert set(row) == {"id", "conversations"}
        for turn in row["conversations"]:
            assert set(turn) == {"from", "value"}
            assert turn["value"] == turn["value"].strip() != ""


def test_no_conversation_and_no_first_message_occurs_twice(rows: list[Row]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({json.dumps(row["conversations"]) for row in rows}) == len(rows)
    assert len({words[0].casefold() for _, _, words in talks(rows)}) == len(rows)


def test_the_answers_vary(rows: list[Row]) -> None:
    last = [words[-1] for _, _, words in talks(rows)]
    assert len(set(last)) >= 0.85 * len(last)


@pytest.mark.parametrize(
    ("day", "overnight", "ready"), [("Friday", True, "Saturday"), ("Saturday", True, "Monday"), ("Friday", False, None)]
)
def test_a_confirmation_follows_from_the_visit(
    generator: ModuleType, day: str, overnight: bool, ready: str | None
) -> None:
    job = next(job for job in generator.JOBS if job.overnight == overnight)
    visit = generator.Visit(job, day, "noon", "Ada", bike="tandem")
    end = f"Ready {ready}!" if ready else f"See you {day}!"
    assert generator.confirm(visit) == f"Booked, Ada: {job.name} for your tandem, {day} at noon, ${job.price}. {end}"
