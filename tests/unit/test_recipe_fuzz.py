"""Whatever a recipe or an override says: a recipe or a message, soon; never a traceback."""

import contextlib
import string
import time
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisft.errors import UserError
from minisft.recipe import DataRecipe, EvaluationRecipe, Recipe, TrainingRecipe, dump_recipe, load_recipe

SECONDS = 5
KEYS = [
    "model", "output", "seed", "data", "source", "test", "path", "weight", "limit", "split", "template", "training",
    "epochs", "lora", "rank", "evaluation", "metrics", "prompts", "<<", "=", "~", "",
]  # fmt: skip
SCALARS = [
    "", "null", "~", "true", "1", "-1", "0x" + "f" * 50, "0b1", "1:30:00", "1e5", ".inf", ".nan", "2024-13-45",
    "2024-01-01", "!!int x", "!!float ''", "!!bool x", "!!timestamp x", "!!binary x", "!!null x", "!!set {a}", "!own x",
    "!!python/object:os.system x", "!!str", "!!int ''", "*a", "&a x", "&a [*a]", "&a {b: *a}", "&a", '"\\ud800"',
    '"\\UFFFFFFFF"', '"\\0"', "'", '"', "|", ">-", "?", "- a", "%YAML 9.9", "---", "...", "[", "{", "]", "}", ", ",
    "~/x", "~nobody-of-that-name/x", "**", "[a", "[!]*", "bleu", "data/*.jsonl", "9" * 200, "\x00", "\x85", "\ufeff", "é",
]  # fmt: skip
scalars = st.one_of(st.sampled_from(SCALARS), st.text(max_size=8), st.text(string.punctuation + " \n", max_size=12))
flows = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        ),
    ),
    max_leaves=10,
)
line = st.tuples(st.sampled_from(["", "  ", "    ", "- "]), st.sampled_from(KEYS), flows).map(
    lambda parts: f"{parts[0]}{parts[1]}: {parts[2]}\n"
)
GOOD = "model: m\noutput: o\ndata:\n  source: d.jsonl\n"
texts = st.one_of(
    st.just(GOOD),
    st.text(max_size=60),
    st.lists(line, max_size=6).map("".join),
    st.lists(line, max_size=4).map(lambda lines: GOOD + "".join(lines)),
    flows.map(lambda value: f"model: m\noutput: o\ndata: {{source: {value}}}\n"),
)
SECTIONS = {"data": DataRecipe, "training": TrainingRecipe, "evaluation": EvaluationRecipe}
DOTTED = [f"{section}.{entry.name}" for section, kind in SECTIONS.items() for entry in fields(kind)]
keys = st.one_of(
    st.lists(st.sampled_from(KEYS), min_size=1, max_size=3).map(".".join),
    st.sampled_from([*DOTTED, "model", "output", "seed", "training.lora.rank"]),
)
overrides = st.lists(st.tuples(keys, flows).map("=".join), max_size=3)
bounds = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def reread(path):
    try:
        return load_recipe(path)
    except UserError as error:
        raise AssertionError("a resolved recipe is refused") from error


def assert_recipe_or_message(text, words, folder):
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.monotonic()
    with contextlib.suppress(UserError):
        recipe = load_recipe(path, words)
        assert isinstance(recipe, Recipe)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert reread(path) == recipe or "nan" in repr(recipe)  # which equals nothing
    assert time.monotonic() - started < SECONDS


@settings(bounds, max_examples=300)
@given(text=texts, words=overrides)
def test_any_text_is_a_recipe_or_a_message(text, words, tmp_path):
    assert_recipe_or_message(text, words, tmp_path)


@pytest.mark.long
@settings(bounds, max_examples=5_000)
@given(text=texts, words=overrides)
def test_any_of_five_thousand_texts_is_a_recipe_or_a_message(text, words, tmp_path):
    assert_recipe_or_message(text, words, tmp_path)
