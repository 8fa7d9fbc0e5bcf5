"""The text of a recipe: sections, comments, and values that read back as they were."""

import pytest
import yaml

from minisft.new_recipe.recipe_text import Entry, recipe_text


@pytest.mark.parametrize(
    "value",
    [2e-4, 8e-6, 0.1, 0.017, 1, 128, None, True, "auto", "no", "1e3", "a: b", "#x", "[INST]", "~", "", "it's",
     "with space.jsonl", "data/*.jsonl", ["a.jsonl", "b c.jsonl"], {"rank": 16, "alpha": 32}, {"path": "x", "limit": 3},
     "名前.jsonl", "x" * 300],
)  # fmt: skip
def test_a_value_reads_back(value):
    text = recipe_text([], [Entry("data.key", value, "why")])
    assert yaml.safe_load(text) == {"data": {"key": value}}


def test_sections_comments_and_the_head():
    text = recipe_text(
        ["Head.", "", "  minisft train recipe.yaml", "lengths    " + "12 " * 50],
        [
            Entry("model", "m", "The model."),
            Entry("data.source", "d.jsonl", "word " * 60),
            Entry("data.limit", 400, "A first run:", as_comment=True),
            Entry("training.epochs", 3, "Few rows."),
        ],
    )
    lines = text.splitlines()
    assert lines[:3] == ["# Head.", "#", "#   minisft train recipe.yaml"]
    assert lines[3].startswith("# lengths    12 12")
    assert lines[4].startswith("#            12 12")
    assert "  # limit: 400" in lines
    assert max(map(len, lines)) <= 110
    assert text.count("data:") == 1
    assert yaml.safe_load(text) == {"model": "m", "data": {"source": "d.jsonl"}, "training": {"epochs": 3}}


def test_a_reason_cannot_end_its_comment():
    text = recipe_text(["a\nmodel: b"], [Entry("model", "m", "of rows\r\nmodel: evil\x1b[31m\u2028x: y")])
    assert yaml.safe_load(text) == {"model": "m"}
    assert "\x1b" not in text
