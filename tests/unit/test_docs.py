"""What the documentation shows works: recipes load, and commands are ones that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from minisft.cli import VERBS
from minisft.recipe import Recipe, load_recipe
from minisft.yaml_tree import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
BASE = {"model": "model: m\n", "output": "output: o\n", "data": "data: {source: d.jsonl}\n"}


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            yield pytest.param(found[1], id=f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}")


def commands():
    """Commands with all that they need; a mention such as `minisft evaluate` names a verb only."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for found in re.finditer(r"(?:^|[`/ ])minisft ([a-z]+)( [^-`\n][^`\n]*)?(`?)", text, re.MULTILINE):
            line = f"{found[1]}{found[2] or ''}".partition(" #")[0].strip()
            whole = (found[2] or found[1] == "demo") and (found[3] or text[found.start()] != "`")
            if found[1] in VERBS and whole and "$" not in line and not (page.suffix == ".md" and "| " in line):
                yield pytest.param(line, id=f"{page.name}:{text.count(chr(10), 0, found.start(1)) + 1}")


@pytest.mark.parametrize("block", blocks())
def test_every_yaml_block_is_a_part_of_a_recipe(block, tmp_path):
    keys = parse(block, "the block").plain()
    path = tmp_path / "recipe.yaml"
    path.write_text(block + "".join(line for key, line in BASE.items() if key not in keys), encoding="utf-8")
    source = () if "source" in keys.get("data", {"source": ""}) else ("data.source=d.jsonl",)
    assert isinstance(load_recipe(path, source), Recipe)


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one(line, tmp_path):
    verb, *words = shlex.split(line.replace("=...", "=fp32").replace(" ...", ""))
    arguments = VERBS[verb].parser(verb).parse_intermixed_args(words)
    if arguments.words and arguments.words[0].startswith("recipes/"):
        assert (ROOT / arguments.words[0]).is_file()
    overrides = [word for word in arguments.words if "=" in word]
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(BASE.values()), encoding="utf-8")
    assert isinstance(load_recipe(path, overrides), Recipe)


def test_there_are_blocks_and_commands_to_look_at():
    assert len(list(blocks())) >= 3
    assert len(list(commands())) >= 40
