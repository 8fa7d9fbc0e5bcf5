"""Recipes as people and attackers write them: each mistake gets a message, and no text takes long to read."""

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.command import refused, run
from tests.tiny import write_conversations

DOCS = Path(__file__).parents[2]


def accepted(capsys, *words):
    status, out, err = run(capsys, *words)
    assert status == 0, err
    return out


def ledger(recipe_file):
    return json.loads((recipe_file.parent / "run" / "dataset" / "ledger.json").read_text())


# --- bounded ----------------------------------------------------------------------------------------------

LEVELS = ["&a0 [x, x, x, x, x, x, x, x, x]", *(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
SOURCE = f"[{', '.join(LEVELS)}]"
BOMB = f"model: m\noutput: o\ndata:\n  source: {SOURCE}\n"
LONG = {
    "bomb": (BOMB, "more than 20,000 values"),
    "merged bomb": (BOMB.replace("[", "[{k: [").replace("]", "]}]"), "more than 20,000 values"),
    "itself": ("data: &x {source: *x}\n", "nested more than 40 deep, or one refers to itself"),
    "its own item": ("data: {source: &x [a, *x]}\n", "nested more than 40 deep, or one refers to itself"),
    "merges itself": ("data: &x {<<: *x, source: a}\n", "nested more than 40 deep, or one refers to itself"),
    "lists": ("data: " + "[" * 5000 + "]" * 5000, "nested more than 40 deep"),
    "mappings": ("data: " + "{a: " * 5000 + "}" * 5000, "nested more than 40 deep"),
    "wide": ("data: [" + "a," * 30_000 + "]", "more than 20,000 values"),
    "large": ("# " + "x" * 2_000_000, "characters"),
    "digits": ("seed: " + "9" * 5000, "a number of more than 100 characters"),
    "sixties": ("seed: 1" + ":1" * 100_000, "a number of more than 100 characters"),
}


@pytest.mark.parametrize("name", LONG)
def test_no_recipe_takes_long(capsys, recipe_file, name):
    text, words = LONG[name]
    recipe_file.write_text(text)
    started = time.monotonic()
    assert words in refused(capsys, "prepare", recipe_file)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["bomb", "itself", "its own item", "lists", "mappings", "wide"])
def test_no_override_takes_long(capsys, recipe_file, name):
    text, words = LONG[name]
    text = SOURCE if name == "bomb" else text.removeprefix("data: ")
    started = time.monotonic()
    assert words in refused(capsys, "prepare", recipe_file, f"data.source={text}")
    assert time.monotonic() - started < 10


def test_references_in_moderation_are_values(capsys, recipe_file, conversations):
    two = f"[&a {{path: {conversations}, weight: 2}}, {{<<: *a, weight: 1}}]"
    text = recipe_file.read_text().replace(f"source: {conversations}", f"source: {two}")
    recipe_file.write_text(text)
    assert "99 read" in accepted(capsys, "prepare", recipe_file)


# --- accepted in silence before ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{path: PATH, weight: true}", "data.source.weight: must be a number above 0"),
        ("{path: PATH, limit: true}", "data.source.limit: must be a whole number above 0"),
        ("{path: PATH, split: train}", "data.source.split: PATH is local"),
        ("{path: PATH, subset: en}", "data.source.subset: PATH is local"),
        ("[{path: PATH, revision: main}]", "data.source.revision: PATH is local"),
        ("[{path: PATH, limit: 1, limit: 2}]", "the key 'limit' is given twice"),
        ("[[{path: PATH, path: PATH}]]", "the key 'path' is given twice"),
    ],
)
def test_an_impossible_source_is_refused_on_the_command_line_and_in_the_file(
    capsys, recipe_file, conversations, source, words
):
    source, words = source.replace("PATH", str(conversations)), words.replace("PATH", str(conversations))
    assert words in refused(capsys, "prepare", recipe_file, f"data.source={source}")
    recipe_file.write_text(recipe_file.read_text().replace(f"source: {conversations}", f"source: {source}"))
    assert words in refused(capsys, "prepare", recipe_file)


def test_a_doubled_metric(capsys, recipe_file):
    said = refused(capsys, "prepare", recipe_file, "evaluation.metrics=[bleu, bleu]")
    assert "evaluation.metrics: a metric is named twice" in said


@pytest.mark.parametrize("seed", [2**32, 2**64 - 1, 10**30])
def test_a_seed_of_more_than_32_bits(capsys, recipe_file, seed):
    assert "seed" in refused(capsys, "prepare", recipe_file, f"seed={seed}")


def test_the_largest_seed(capsys, recipe_file):
    accepted(capsys, "prepare", recipe_file, f"seed={2**32 - 1}")


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_an_absurd_number_of_epochs(capsys, recipe_file, verb):
    assert "training.epochs: 1e+30 is too large" in refused(capsys, verb, recipe_file, "training.epochs=1e30")


# --- paths ------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def test_output_in_the_home_folder(capsys, recipe_file, home):
    accepted(capsys, "prepare", recipe_file, "output=~/x")
    assert (home / "x" / "dataset" / "ledger.json").exists()
    assert not any((home.parent / "here").iterdir())


def test_every_path_may_lie_in_the_home_folder(capsys, recipe_file, home):
    for name in ("a", "b", "c", "test"):
        write_conversations(home / f"{name}.jsonl", 30, seed=ord(name[0]))
    (home / "own.jinja").write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    (home / "mine.txt").write_text("Hello\n")
    accepted(
        capsys, "train", recipe_file, "data.source=[~/a.jsonl, {path: ~/b.jsonl}, ~/c*]", "data.test=~/test.jsonl",
        "data.template=~/own.jinja", "evaluation.prompts=~/mine.txt", "training.max_steps=1",
    )  # fmt: skip
    resolved = yaml.safe_load((recipe_file.parent / "run" / "recipe.yaml").read_text())
    sources = [str(home / "a.jsonl"), {"path": str(home / "b.jsonl")}, str(home / "c*")]
    assert resolved["data"]["source"] == sources
    assert resolved["data"]["test"] == str(home / "test.jsonl")
    assert resolved["data"]["template"] == str(home / "own.jinja")
    assert resolved["evaluation"]["prompts"] == str(home / "mine.txt")


@pytest.mark.parametrize("key", ["output", "data.source", "data.test", "data.template", "evaluation.prompts", "model"])
@pytest.mark.parametrize("path", ["''", "' '", "~no-such-user/x"])
def test_a_path_that_is_none(capsys, recipe_file, tmp_path, monkeypatch, key, path):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "prepare", recipe_file, f"{key}={path}")
    assert f"the command line: {key}: " in said
    assert "the path is empty" in said or "home folder that does not exist" in said


def test_an_empty_source_does_not_read_the_current_folder(capsys, recipe_file, conversations, monkeypatch):
    monkeypatch.chdir(conversations.parent)
    for source in ("", "''", "[[]]", "['']", "{path: ''}", "[{path: ' '}]"):
        refused(capsys, "prepare", recipe_file, f"data.source={source}")
    recipe_file.write_text(recipe_file.read_text().replace(str(conversations), "''"))
    assert "recipe.yaml:4: data.source: the path is empty" in refused(capsys, "prepare", recipe_file)
    assert not (recipe_file.parent / "run").exists()


# --- an empty value is the default ------------------------------------------------------------------------


def test_an_empty_value_is_the_default(capsys, recipe_file):
    text = recipe_file.read_text().replace("  max_length: 256\n", "  max_length: 256\n  test_fraction:\n  limit:\n")
    text = text.replace("training:\n", "training:\n  lora:\n")
    text = text.replace("evaluation:\n  max_new_tokens: 8\n", "evaluation:\n  # max_new_tokens: 8\n")
    recipe_file.write_text(text)
    assert "30 train + 3 test" in accepted(
        capsys, "train", recipe_file, "training.epochs=", "training.report_to=", "training.max_steps=1"
    )
    resolved = yaml.safe_load((recipe_file.parent / "run" / "recipe.yaml").read_text())
    assert (resolved["training"]["lora"], resolved["training"]["epochs"]) == (None, 8.0)
    assert resolved["evaluation"]["max_new_tokens"] == 256


def test_null_keeps_its_meaning(capsys, recipe_file):
    assert "data.test_fraction: None does not fit" in refused(capsys, "prepare", recipe_file, "data.test_fraction=null")
    recipe_file.write_text(recipe_file.read_text().replace("  epochs: 2\n", "  epochs: ~\n"))
    assert "training.epochs: None does not fit" in refused(capsys, "prepare", recipe_file)


def test_a_required_key_without_a_value(capsys, recipe_file):
    assert "the command line: the key 'output' has no value" in refused(capsys, "prepare", recipe_file, "output=")
    recipe_file.write_text("model: m\noutput: o\ndata:\n  # source: x\n")
    assert "recipe.yaml:3: the key 'data' has no value" in refused(capsys, "prepare", recipe_file)


def test_a_question_mark_without_quotes_is_explained(capsys, recipe_file):
    recipe_file.write_text(recipe_file.read_text() + "  prompts: [How long does a chain last?, Yes]\n")
    said = refused(capsys, "prepare", recipe_file)
    assert "recipe.yaml:13: this is not YAML" in said
    assert "needs quotes" in said
