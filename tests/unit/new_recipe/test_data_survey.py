"""What `init` finds in rows: counts, the sample, and lengths that are those of `prepare`."""

import json
from collections import Counter

import numpy as np
import pytest

from minisft.data.encoder import Encoder
from minisft.data.preparation import prepare
from minisft.data.prepared import load_split
from minisft.data.sources import parse_sources
from minisft.errors import UserError
from minisft.new_recipe import data_survey
from minisft.new_recipe.data_survey import answer_places, open_data, scripts, survey_rows, survey_tokens
from minisft.recipe import make_recipe
from tests.tiny import byte_tokenizer


def talk(*texts, **more):
    names = ("human", "gpt")
    return {"conversations": [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)], **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def survey(*paths):
    return survey_rows(open_data(parse_sources([str(path) for path in paths])))


def test_rows_are_counted_by_what_they_hold(tmp_path):
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    rows = [
        talk(f"first {words}", "yes"),
        talk(f"first {words}", "yes"),  # a duplicate
        talk(f"first {words}", "yes yes"),  # a near-duplicate
        talk("What is tea?", "<think>a leaf</think>A drink."),
        talk("Call it.", "done", tools=json.dumps([{"name": "call"}])),
        talk("Hello?", "Hi!", "Any tea?"),  # can be repaired
        talk("Only a question?"),  # cannot
        {"conversations": 7},
    ]
    found = survey(write(tmp_path / "rows.jsonl", rows))
    assert (found.rows, found.parsed, found.conversations, found.repairable) == (8, 8, 5, 1)
    assert found.problems == Counter(unanswered_end=2, content_not_text=1)
    assert found.repairs == Counter(unanswered_end_trimmed=1)
    assert (found.duplicates, found.near_duplicates) == (1, 1)
    assert (found.with_tools, found.with_reasoning) == (1, 1)
    assert found.turns == Counter(user=6, assistant=6)
    assert found.usable == 6
    assert found.formats == ("sharegpt",)


def test_the_sample_is_drawn_from_all_rows_and_their_number_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(data_survey, "MOST_TOKENIZED", 50)
    monkeypatch.setattr(data_survey, "MOST_PARSED", 100)
    rows = [talk(f"question {number}", f"answer {number}") for number in range(4000)]
    found = survey(write(tmp_path / "rows.jsonl", rows))
    assert (found.rows, found.conversations, found.usable) == (4000, found.parsed, 4000)
    assert 100 <= found.parsed < 4000
    drawn = [int(row["conversations"][0]["value"].split()[1]) for chunk in found.sample for _, row in chunk.rows]
    assert len(set(drawn)) == len(drawn) == 50
    assert 1400 < np.mean(drawn) < 2600
    again = survey(tmp_path / "rows.jsonl")
    assert again.sample == found.sample


def test_two_formats_in_one_file_are_refused_and_in_two_files_are_read(tmp_path):
    alpaca = {"instruction": "Say a.", "output": "a"}
    mixed = write(tmp_path / "mixed.jsonl", [talk("a", "b"), alpaca])
    with pytest.raises(UserError, match="format alpaca, and rows before it are in the format sharegpt") as error:
        survey(mixed)
    assert error.value.where == "mixed.jsonl:2"
    assert "init FILE1 FILE2" in error.value.fix
    one, other = write(tmp_path / "one.jsonl", [talk("a", "b")] * 2), write(tmp_path / "other.jsonl", [alpaca])
    found = survey(one, other)
    assert found.formats == ("sharegpt", "alpaca")
    assert (found.conversations, [chunk.source for chunk in found.sample]) == (3, [0, 1])


def test_rows_without_any_conversation_are_refused(tmp_path):
    with pytest.raises(UserError, match="none of the 2 rows is a conversation") as error:
        survey(write(tmp_path / "rows.jsonl", [talk("a question"), talk("another")]))
    assert "rows.jsonl:1" in error.value.where


def test_lengths_are_those_of_the_prepared_data(tmp_path, tiny_model, conversations):
    encoder = Encoder(byte_tokenizer(), "chatml")
    found = survey_tokens(survey(conversations), encoder)
    recipe = make_recipe(
        [("model", str(tiny_model)), ("output", str(tmp_path / "run")), ("data.source", str(conversations)),
         ("data.template", "chatml"), ("data.test_fraction", 0.0)]
    )  # fmt: skip
    prepared = prepare(recipe)
    train = load_split(tmp_path / "run", "train")
    assert sorted(found.lengths.tolist()) == sorted(map(len, train["input_ids"]))
    assert found.supervised.sum() == prepared.ledger["tokens"]["supervised"] == found.answers.sum()
    assert found.answers.size == prepared.ledger["turns"]["supervised"]
    assert found.is_last.sum() == found.conversations == 33
    assert found.stop_tokens == ("</s>",)
    answers = [m["content"] for row in map(json.loads, conversations.open()) for m in _answers(row)]
    assert found.characters == sum(map(len, answers))
    assert found.per_character == 1.0  # a byte a token


def _answers(row):
    return [{"content": turn["value"]} for turn in row["conversations"] if turn["from"] == "gpt"]


def test_places_of_answers():
    none = -100
    labels = np.array([none, 1, 2, none, 3, 4, none, 5, none, none, none], dtype=np.int32)
    offsets = np.array([7, 12, 15, 17, 18])  # rows of 5, 3, 2 and 1 tokens; the second begins with an answer
    lengths, supervised, answers, ends, is_last = answer_places(labels, offsets)
    assert lengths.tolist() == [5, 3, 2, 1]
    assert supervised.tolist() == [3, 2, 0, 0]
    assert answers.tolist() == [2, 1, 1, 1]
    assert ends.tolist() == [3, 5, 1, 3]
    assert is_last.tolist() == [False, True, False, True]


def test_scripts_are_shares_of_letters():
    assert scripts(Counter("abcd 123 !?")) == {"latin": 1.0}
    assert scripts(Counter("abc山")) == {"latin": 0.75, "cjk": 0.25}
    assert list(scripts(Counter("да нет yes"))) == ["cyrillic", "latin"]
    assert scripts(Counter("12 ...")) == {}
    assert scripts(Counter("a" * 9999 + "山")) == {"latin": 0.9999}
