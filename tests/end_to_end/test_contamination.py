"""`minisft contamination`: planted test rows and benchmark items are found, all others are not, and scores without them."""

import json
import random

import pytest

import minisft
from minisft.cli import main
from minisft.evaluation.metrics import CorpusScore
from tests.command import refused, run

WORDS = [f"w{number}" for number in range(500)]
PLANTED = 6
SYSTEM = "You are the assistant of a shop and answer every question with care and patience, always in one sentence."


def talk(name, prompt, answer):
    turns = [("system", SYSTEM), ("human", prompt), ("gpt", answer)]
    return {"id": name, "conversations": [{"from": who, "value": text} for who, text in turns]}


@pytest.fixture(scope="module")
def leaky(tmp_path_factory, tiny_model):
    """A run whose train rows nearly hold test rows 0 to 5, and 13 words of the answers of rows 6 and 7."""
    folder = tmp_path_factory.mktemp("leaky")
    choose = random.Random(1)

    def text(words):
        return " ".join(choose.choices(WORDS, k=words))

    test = [talk(f"test-{n}", text(8), text(42)) for n in range(24)]
    train = [talk(f"train-{n}", text(8), text(42)) for n in range(40)]
    for number in range(PLANTED):
        asked, answer = (turn["value"] for turn in test[number]["conversations"][1:])
        words = answer.split()
        words[20] = "changed"
        train.append(talk(f"near-{number}", asked, " ".join(words)))
    for number in (PLANTED, PLANTED + 1):
        part = test[number]["conversations"][2]["value"].split()[5:18]
        train.append(talk(f"part-{number}", text(8), f"{text(9)} {' '.join(part).upper()} {text(9)}"))
    choose.shuffle(train)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\noutput: {folder / 'run'}\n"
        f"data: {{source: {folder / 'train.jsonl'}, test: {folder / 'test.jsonl'}, template: mistral, max_length: 500}}\n"
        "training: {max_steps: 1, batch_size: 2, precision: fp32}\nevaluation: {max_new_tokens: 4}\n"
    )
    assert main(["train", str(recipe)]) == 0
    return folder


def test_planted_rows_are_found_and_no_others(leaky, capsys):
    status, printed, _ = run(capsys, "contamination", leaky / "run")
    assert status == 0
    assert "8 of 24 test rows are contaminated by 48 train rows: 6 are near-duplicates" in printed
    found = json.loads((leaky / "run/evaluation/contamination.json").read_text())
    rows = {row["id"]: row for row in found["test"]["rows"]}
    assert sorted(rows) == [f"test-{n}" for n in range(PLANTED + 2)]
    for number in range(PLANTED):
        row = rows[f"test-{number}"]
        assert row["near_duplicate_of"] == row["overlaps"] == f"near-{number}"
        assert row["similarity"] >= 0.8
        assert row["share"] == 41 / 42 or row["share"] == round(41 / 42, 4)  # all words but the changed one
        assert row["location"] == f"test.jsonl:{number + 1}"
    for number in (PLANTED, PLANTED + 1):
        row = rows[f"test-{number}"]
        assert (row["near_duplicate_of"], row["overlaps"]) == (None, f"part-{number}")
        assert row["share"] == round(13 / 42, 4)


def test_the_scores_without_them_are_those_of_the_other_rows(leaky, capsys):
    assert main(["evaluate", str(leaky / "run")]) == 0
    printed = run(capsys, "contamination", leaky / "run").out
    assert "BLEU, all 24" in printed
    assert "without, 16" in printed
    found = json.loads((leaky / "run/evaluation/contamination.json").read_text())
    assert [entry["model"] for entry in found["scores"]] == ["base", "checkpoint-1"]
    results = json.loads((leaky / "run/evaluation/results.json").read_text())
    for entry in found["scores"]:
        text = (leaky / "run/evaluation" / entry["model"] / "outputs.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()][PLANTED + 2 :]
        scored = CorpusScore("chrf", [line["output"] for line in lines], [line["reference"] for line in lines])
        assert entry["chrf"]["clean"] == scored.score
        assert (entry["answers"], entry["clean_answers"]) == (24, 16)
    assert found["scores"][0]["bleu"]["all"] == pytest.approx(results["base"]["bleu"]["score"])


def test_items_of_a_benchmark_are_found_in_every_kind_of_file(leaky, tmp_path, capsys):
    rows = [json.loads(line) for line in (leaky / "train.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["id"].startswith("train-"))
    inside = row["conversations"][2]["value"].split()
    clean = "a question of a benchmark that no row of the training data has ever held at all"
    (tmp_path / "b.txt").write_text(f"{clean}\n\n{' '.join(inside[4:20])}\nshort\n")
    items = [{"turns": [clean, "x"]}, {"nested": {"deep": [{"text": " ".join(inside)}]}, "number": 3}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    words = [option for name in ("b.txt", "b.jsonl") for option in ("--against", tmp_path / name)]
    status, printed, said = run(capsys, "contamination", leaky / "run", *words, "--json")
    assert status == 0, said
    found = json.loads(printed)
    assert found == json.loads((leaky / "run/evaluation/contamination.json").read_text())
    text, lines = found["against"]
    assert [(one["location"], one["split"], one["row"]) for one in text["found"]] == [("b.txt:3", "train", row["id"])]
    assert (text["items"], text["too_short"], text["in_train"], text["in_test"]) == (3, 1, 1, 0)
    assert text["found"][0]["share"] == 1.0
    assert [one["location"] for one in lines["found"]] == ["b.jsonl:2"]
    assert minisft.contamination(leaky / "run", [tmp_path / "b.txt"])["against"] == [text]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("none.jsonl", None, "there is no such file"), ("b.pdf", "x", "its type is unknown"),
     ("b.jsonl", '{"a": 1}\n{"a": \n', "b.jsonl:2"), ("org/name", None, "there is no such file"),
     ("b.txt", None, "there is no such file")],
)  # fmt: skip
def test_files_that_cannot_be_read_are_refused(leaky, tmp_path, capsys, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert said in refused(capsys, "contamination", leaky / "run", "--against", path)


def test_unprepared_data_are_refused(recipe_file, capsys):
    assert "there is no prepared data" in refused(capsys, "contamination", recipe_file)
