"""The JSON Schema of a recipe: up to date, described, and of one opinion with the loader."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from jsonschema import Draft202012Validator

import minisft
from minisft.errors import UserError
from minisft.recipe import load_recipe, make_recipe
from minisft.recipe_schema import read_descriptions, recipe_keys
from tests.command import refused, run
from tests.unit.test_recipe_fuzz import bounds, texts

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCHEMA = minisft.schema()
VALIDATOR = Draft202012Validator(SCHEMA)
BASE = {"model": "m", "output": "o", "data.source": "d.jsonl"}
SECTIONS = {"data", "training", "evaluation", "training.lora"}
# Values of every YAML type; `vanilla`, `auto`, `epoch` and `bleu` are right for some keys and wrong for others.
VALUES = [
    "text", "", "vanilla", "auto", "epoch", "8e-6", "1_000.5", ".5", "1e", "0x10", 0, 1, -3, 2.5, True, False,
    [], ["bleu"], ["a", 1], [None], [["a"]], {}, {"a": 1}, {"a": True}, {"a": "b"}, {"a": [1]}, {"rank": 8}, {"rank": "x"},
]  # fmt: skip


def accepts(instance):
    return VALIDATOR.is_valid(instance)


def with_key(key, value):
    """Return a recipe as a mapping, with one key changed; a section takes the place of its keys."""
    tree: dict = {}
    base = {name: item for name, item in BASE.items() if not name.startswith(f"{key}.")}
    for dotted, item in {**base, key: value}.items():
        *sections, name = dotted.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = item
    return tree


def test_it_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)


def test_the_command_prints_the_file_beside_the_recipes(capsys):
    printed = run(capsys, "schema").out
    assert json.loads(printed) == SCHEMA
    file = ROOT / "recipes" / "recipe.schema.json"
    assert file.read_text(encoding="utf-8") == printed, "run `minisft schema > recipes/recipe.schema.json`"


def test_it_takes_no_words(capsys):
    refused(capsys, "schema", "recipe.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_fit_and_name_it_for_editors(path):
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    named = path.parent / first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(named.read_text(encoding="utf-8")) == SCHEMA
    VALIDATOR.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_reference_describes_exactly_the_keys_with_their_defaults():
    assert sorted(read_descriptions()) == sorted(set(recipe_keys()) - SECTIONS | {"training.lora"})
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for key, description in read_descriptions().items():
        name = key.split(".", 1)[1] if key.split(".")[0] in SECTIONS else key
        cells = {line.split(" | ")[1] for line in page.splitlines() if line.startswith(f"| `{name}` |")}
        node = SCHEMA
        for part in key.split("."):
            inner = node if "properties" in node else next(one for one in node["anyOf"] if "properties" in one)
            node = inner["properties"][part]
        assert "](" not in description
        assert node["description"] == description
        assert node.get("default", "required") in [yaml.safe_load(cell) for cell in cells], key


@pytest.mark.parametrize("key", sorted(set(recipe_keys())))
def test_a_type_that_the_loader_refuses_is_refused_and_no_other(key):
    for value in VALUES:
        try:
            make_recipe([*BASE.items(), (key, value)])
            fits = True
        except UserError as error:  # the limits of numbers are not in the schema
            fits = not any(reason in error.problem for reason in ("does not fit", "unknown key", "is missing"))
        assert accepts(with_key(key, value)) == fits, f"{key}: {value!r}"


@pytest.mark.parametrize("key", ["sede", "data.sorce", "training.epoch", "training.lora.ranks", "evaluation.metric"])
def test_a_wrong_key_is_refused_by_both(key):
    with pytest.raises(UserError, match="unknown key"):
        make_recipe([*BASE.items(), (key, 1)])
    assert not accepts(with_key(key, 1))


@pytest.mark.parametrize("key", BASE)
def test_a_missing_key_is_refused_by_both(key):
    with pytest.raises(UserError):
        make_recipe([pair for pair in BASE.items() if pair[0] != key])
    tree = with_key("seed", 0)
    del tree[key.partition(".")[0]]
    assert not accepts(tree)


def test_keys_without_a_value_are_accepted_by_both(tmp_path):
    lines = "model: m\noutput: o\nseed:\ndata:\n  source: d\n  limit:\n  template_options: {a: }\ntraining:\n  lora:\n"
    (tmp_path / "recipe.yaml").write_text(lines + "evaluation:\n")
    load_recipe(tmp_path / "recipe.yaml")
    VALIDATOR.validate(yaml.safe_load(lines + "evaluation:\n"))


@bounds
@given(texts)
def test_what_the_loader_accepts_the_schema_accepts(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(path)
    except UserError:
        return
    assert accepts(keys_as_text(yaml.safe_load(path.read_text(encoding="utf-8"))))


def keys_as_text(value):
    if isinstance(value, dict):
        return {str(key): keys_as_text(item) for key, item in value.items()}
    return [keys_as_text(item) for item in value] if isinstance(value, list) else value
