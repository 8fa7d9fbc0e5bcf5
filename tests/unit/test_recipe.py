"""The recipe is strict, and says what is wrong where."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from minisft.errors import UserError
from minisft.recipe import Recipe, dump_recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


GOOD = "model: m\noutput: o\ndata:\n  source: d.jsonl\n"


def message(tmp_path, text, *overrides):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    assert isinstance(load_recipe(path), Recipe)


def test_the_defaults_are_the_published_recipe(tmp_path):
    training = load_recipe(write(tmp_path, GOOD)).training
    assert (training.learning_rate, training.epochs, training.batch_size) == (8e-6, 8, 8)
    assert (training.weight_decay, training.scheduler, training.optimizer) == (1e-5, "linear", "adamw")
    assert (training.strategy, training.precision, training.max_grad_norm) == ("vanilla", "auto", 2.0)


def test_a_dumped_recipe_is_read_back_equal(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["training.learning_rate=3e-5", "training.save_every=7"])
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert asdict(again) == asdict(recipe)


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    assert load_recipe(write(tmp_path, GOOD + "training:\n  learning_rate: 8e-6\n")).training.learning_rate == 8e-6


def test_overrides_win_and_make_sections(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["training.epochs=3", "model=other", "evaluation.limit=null"])
    assert (recipe.training.epochs, recipe.model, recipe.evaluation.limit) == (3.0, "other", None)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (GOOD + "training:\n  epoch: 3\n", (), r"recipe.yaml:6: unknown key 'training.epoch'.*'training.epochs'"),
        (GOOD + "modle: x\n", (), r"recipe.yaml:5: unknown key 'modle'.*did you mean 'model'"),
        (GOOD, ("training.epoch=3",), r"command line: unknown key 'training.epoch'.*'training.epochs'"),
        (GOOD + "training:\n  epochs: many\n", (), r"recipe.yaml:6: training.epochs: 'many' does not fit.*a number"),
        (GOOD + "training:\n  processes: 1.5\n", (), r"recipe.yaml:6: training.processes: 1.5 .*a whole number"),
        (GOOD + "training:\n  strategy: zero4\n", (), r"training.strategy: 'zero4'.*did you mean"),
        (GOOD + "seed: true\n", (), r"seed: True does not fit.*a whole number"),
        (GOOD + "training: 3\n", (), r"recipe.yaml:5: training: 3 does not fit"),
        (GOOD + "training:\n  batch_size: 0\n", (), r"recipe.yaml:6: training.batch_size: 0 is not above zero"),
        (
            GOOD + "  test_fraction: 1.0\n",
            (),
            r"recipe.yaml:5: data.test_fraction: must be at least 0 and below 1, and is 1.0",
        ),
        (GOOD + "evaluation:\n  metrics: [blue]\n", (), r"recipe.yaml:6: evaluation.metrics: .*'blue'.*bleu, chrf"),
        (GOOD + "  test: d.jsonl\n", (), r"data.test: is the training source itself"),
        ("model: m\noutput: o\n", (), r"the key 'data' is missing"),
        ("model: m\nmodel: n\n", (), r"recipe.yaml:2: the key 'model' is given twice"),
        ("model: [\n", (), r"recipe.yaml:\d: this is not YAML"),
        ("- a\n", (), r"a recipe is a mapping"),
        (GOOD + "seed: -1\n", (), r"recipe.yaml:5: seed: -1 is below zero"),
        (GOOD, ("training.weight_decay=-1",), r"training.weight_decay: -1.0 is below zero"),
        (GOOD, ("evaluation.examples=-1",), r"evaluation.examples: -1 is below zero"),
        (GOOD, ("evaluation.metrics=[]",), r"evaluation.metrics: the list is empty.*bleu"),
        ("model: !own x\noutput: o\ndata: {source: d}\n", (), r"recipe.yaml:1: this value cannot be read"),
        ("model: m\noutput: 2024-13-45\ndata: {source: d}\n", (), r"recipe.yaml:2: this value cannot be read.*quotes"),
        (GOOD, ("epochs",), r"epochs: is not an override"),
        (GOOD, ("training.offload=optimizer",), r"training.offload: vanilla keeps everything.*use a ZeRO stage"),
        (GOOD, ("training.offload=parameters", "training.strategy=zero2"), r"training.offload: zero2 keeps complete"),
        (GOOD, ("training.offload=optimizer", "training.strategy=auto"), r"training.offload: auto chooses"),
        (GOOD, ("training.offload=disk", "training.strategy=zero3"), r"training.offload: 'disk' does not fit"),
        (GOOD, ("training.lora={rank: 0}",), r"training.lora.rank: 0 is not above zero"),
        (GOOD, ("training.lora={load_in_4bit: true}", "training.strategy=zero3"), r"ZeRO-3 cannot shard 4-bit"),
    ],
)
def test_mistakes_are_named_with_line_and_fix(tmp_path, text, overrides, expected):
    said = message(tmp_path, text, *overrides)
    assert re.search(expected, said, re.DOTALL), said
    assert "Fix: " in said


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_source_is_found_from_here_then_beside_the_recipe(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD)
    (tmp_path / "d.jsonl").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_recipe(path).data.source == str(tmp_path / "d.jsonl")
    (elsewhere / "d.jsonl").touch()
    assert load_recipe(path).data.source == str(elsewhere / "d.jsonl")
    assert load_recipe(path, ["data.source=org/name"]).data.source == "org/name"


def test_a_template_file_is_found_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "own.jinja").touch()
    path = write(tmp_path, GOOD + "  template: own.jinja\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(path).data.template == str(tmp_path / "own.jinja")
    (tmp_path / "elsewhere" / "mistral").mkdir()  # a folder of that name changes nothing
    assert load_recipe(path, ["data.template=mistral"]).data.template == "mistral"


def test_a_long_text_is_no_path(tmp_path):
    assert load_recipe(write(tmp_path, GOOD), [f"data.source={'x' * 400}"]).data.source == "x" * 400


def test_every_key_is_documented():
    from dataclasses import fields

    from minisft.recipe import DataRecipe, EvaluationRecipe, TrainingRecipe

    text = (RECIPES.parent / "docs" / "recipe.md").read_text(encoding="utf-8")
    for kind in (Recipe, DataRecipe, TrainingRecipe, EvaluationRecipe):
        for entry in fields(kind):
            assert f"`{entry.name}`" in text, entry.name
