"""Commands and Python of the documentation: each block is run, with a tiny model, or says on the line above why not."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from minisft.cli import VERBS, main
from minisft.recipe import load_recipe
from tests.tiny import write_conversations

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (.+?) -->\n)?^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands that are not MiniSFT's own, and are not run.
OTHERS = (
    "pip",
    "uv",
    "source",
    "apt-get",
    "sha256sum",
    "srun",
    "torchrun",
    "deepspeed",
    "export",
    "cd",
    "git",
    "sbatch",
    "curl",
    "time",
    "eval",
    "chromium",
    "docker",
    "sky",
    "kubectl",
    "rsync",
)
DATA = ("mine.jsonl", "tm4_all.sharegpt.jsonl", "en_all_paths.sharegpt.jsonl", "recipes/demo.sharegpt.jsonl")


class Block(NamedTuple):
    """A fenced block: its language, its text, and why it is not run, or None."""

    language: str
    text: str
    reason: str | None


def blocks(language=None, run=None, pages=PAGES):
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            block = Block(found[2], found[3], found[1])
            if language in (None, block.language) and run in (None, block.reason is None):
                line = text.count("\n", 0, found.start(2)) + 1
                yield pytest.param(block, id=f"{page.name}:{line}")


def commands(text):
    """Yield the words of each command of a block, with its variables replaced."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line.strip()):
            variables[assigned[1]] = assigned[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def own_words(words):
    """Return what follows `minisft` in a command, also behind a launcher; None where the command is another one."""
    for number, word in enumerate(words):
        if word.rpartition("/")[2] == "minisft" and (number == 0 or words[number - 1] in ("-m", "--module")):
            redirects = [place for place, one in enumerate(words) if one == ">"]
            return words[number + 1 : redirects[0] if redirects else None]
    return None


@pytest.mark.parametrize("block", blocks("bash"))
def test_every_command_of_a_block_exists(block, tmp_path):
    """Marked blocks too: verbs, options and keys of the recipe are valid, and files and make targets exist."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\noutput: o\ndata: {source: d.jsonl}\n")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(block.text):
        own = own_words(words)
        if own is not None:
            if own[:1] == ["--help"] or own[1:2] == ["--help"] or own[:1] == ["--version"]:
                continue
            arguments = VERBS[own[0]].parser(own[0]).parse(own[1:])
            overrides = [word for word in getattr(arguments, "words", []) if "=" in word]
            assert load_recipe(recipe, overrides)
        elif words[0] == "make":
            assert [word for word in words[1:] if "=" not in word and word not in targets] == []
        elif words[0] == "python" and words[1].endswith(".py"):
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in script] == []
        else:
            assert words[0].rpartition("/")[2] in (*OTHERS, "python"), words


def test_there_are_blocks_of_both_kinds():
    assert len(list(blocks(run=True))) >= 8
    assert len(list(blocks(run=False))) >= 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_model, scored_run):
    """Return a folder in which the documentation's names exist: recipes of a tiny model, data, and a run."""
    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(ROOT / "tests" / "unit" / "planning" / "models", folder / "tests" / "unit" / "planning" / "models")
    for name in DATA:
        write_conversations(folder / name, 30)
    for path in (*(folder / "recipes").glob("*.yaml"), folder / "recipe.yaml", folder / "RECIPE.yaml"):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        recipe = {"output": "outputs/run", **recipe, "model": str(tiny_model)}
        recipe["data"] = {"source": "mine.jsonl", **recipe.get("data", {}), "max_length": 256}
        recipe["data"].pop("format", None)
        if recipe["data"].get("template", "auto") == "auto":
            recipe["data"]["template"] = "mistral"
        settings = {"max_steps": 2, "precision": "fp32", "processes": 1, "gradient_checkpointing": False}
        recipe["training"] = {**recipe.get("training", {}), **settings}
        recipe["evaluation"] = {**recipe.get("evaluation", {}), "max_new_tokens": 4}
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shutil.copytree(scored_run, folder / "outputs" / "demo")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_commands_of_a_page_run(page, prepared, monkeypatch, capsys):
    """One block after another in one folder, as a reader of a page runs them."""
    monkeypatch.chdir(prepared)
    monkeypatch.setattr("sys.stdin", Path("/dev/null").open())  # noqa: SIM115 - `chat` ends with its input
    text = "".join(block.values[0].text for block in blocks("bash", run=True, pages=[page]))
    for words in commands(text):
        own = own_words(words)
        assert own is not None, f"{words[0]}: mark the block with <!-- not run: REASON -->"
        force = ["--force"] if own[0] == "train" and "--resume" not in own else []
        assert main([*own, *force]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("block", blocks("python", run=True))
def test_the_python_of_a_block_runs(block, prepared, monkeypatch, tiny_model):
    monkeypatch.chdir(prepared)
    rows = [
        {"messages": [{"role": "user", "content": f"Tea {n}?"}, {"role": "assistant", "content": "Yes."}]}
        for n in range(30)
    ]
    text = block.text.replace('"smollm2-135m"', repr(str(tiny_model))).replace("}, ...]", "}, *more]")
    settings = {"data.template": "mistral", "training.max_steps": 2, "training.precision": "fp32"}
    import minisft

    train: Any = minisft.train

    def train_briefly(*words, overrides=None, **named):
        return train(*words, overrides={**(overrides or {}), **settings}, force=True, **named)

    monkeypatch.setattr(minisft, "train", train_briefly)
    exec(text, {"rows": rows, "more": rows})


def test_the_page_of_the_run_folder_names_every_file_of_a_run(scored_run):
    """Of a run that was trained, scored and reported; `*` on the page stands for any number of folders and files."""
    text = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    patterns = [re.escape(name).replace(r"\*", ".+").replace("NAME", "[^/]+").replace("checkpoint\\-N", r"checkpoint-\d+")
                for name in named]  # fmt: skip
    files = [path.relative_to(scored_run).as_posix() for path in scored_run.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [file for file in files if not any(re.fullmatch(pattern, file) for pattern in patterns)] == []
