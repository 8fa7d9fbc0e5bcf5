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
            line = f"{found[1]}{found[2] or ''}".partition(" #")[0].partition(" > ")[0].strip()
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
    arguments = VERBS[verb].parser(verb).parse(words)
    if arguments.words and arguments.words[0].startswith("recipes/"):
        assert (ROOT / arguments.words[0]).is_file()
    overrides = [word for word in arguments.words if "=" in word]
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(BASE.values()), encoding="utf-8")
    assert isinstance(load_recipe(path, overrides), Recipe)


def test_there_are_blocks_and_commands_to_look_at():
    assert len(list(blocks())) >= 3
    assert len(list(commands())) >= 40


@pytest.mark.parametrize(
    "page", [*PAGES[:1], ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_path_of_a_page_exists(page):
    text = re.sub(r"https?://\S+", "", page.read_text(encoding="utf-8"))
    named = re.findall(r"(?<![\w./-])(?:src/minisft|tests|benchmarks|recipes|docs|examples)/[\w./-]*\.\w+", text)
    assert [path for path in named if not (ROOT / path).is_file()] == []


# --- the map of the code ----------------------------------------------------------------------------------

SOURCE = ROOT / "src" / "minisft"
# Words that nobody searches for; each stands for a term of the field (docs/glossary.md).
OLD_WORDS = r"mend|mends|deal|tidy|lay out|learned by heart|rehearsal|staged|wish|heed|stock phrase"
STANDARD = {
    '"mend": self.fix': "a field of check.json, which other programs read",
}


def listed_files():
    """Return the files of the tree in docs/architecture.md, by the indentation of its lines."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text[text.index("```\nsrc/minisft/\n") : text.index("\nrecipes/  tests/")].splitlines()[2:]
    folders: list[str] = []
    for line in tree:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth - 1 :] = [name]
        if not name.endswith("/"):
            assert len(line.split()) > 1, f"{name} has no description"
            yield "".join(folders)


def test_the_tree_of_the_architecture_lists_exactly_the_modules():
    listed = list(listed_files())
    assert sorted(listed) == sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


def test_every_file_and_function_of_the_walks_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+\.py)(?:: ([A-Za-z_.]+))?`((?:, `[A-Za-z_]+`)*)", text)
    assert len(named) >= 40
    for file, name, more in named:
        content = (SOURCE / file if file.startswith(("tests/", "benchmarks/")) is False else ROOT / file).read_text(
            encoding="utf-8"
        )
        for wanted in [*name.split("."), *re.findall(r"\w+", more)]:
            assert not wanted or re.search(rf"^ *(?:def|class) {wanted}\b", content, re.MULTILINE), f"{file}: {wanted}"


def test_messages_and_comments_use_the_terms_of_the_field():
    for path in sorted(SOURCE.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(rf"\b(?:{OLD_WORDS})\b", line, re.IGNORECASE):
                assert any(known in line for known in STANDARD), f"{path}:{number}: {line.strip()}"


def test_the_messages_of_the_faq_are_those_of_the_code():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    assert len(messages) > 20
    assert [message for message in messages if message not in source] == []
