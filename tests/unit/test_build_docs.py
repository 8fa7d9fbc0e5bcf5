"""The documentation site: its pages are complete, what is made from the code agrees with it, and no link is broken."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import minisft
from minisft.cli import VERBS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("build_docs")


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("reference_pages")


@pytest.fixture
def project(tmp_path):
    """The parts of the project that the pages are made from, to be changed."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def test_the_navigation_lists_every_page(build, tmp_path):
    pages = build.stage_pages(tmp_path / "staged")
    assert {page.name for page in pages} >= {path.name for path in (ROOT / "docs").glob("*.md")}
    assert all((tmp_path / "staged" / page.name).read_text(encoding="utf-8") == page.text for page in pages)
    assert (tmp_path / "staged" / "files" / "examples" / "first_steps.ipynb").is_file()  # docs/api.md links to it


def test_a_page_that_is_not_in_the_navigation_is_named(build, project, tmp_path):
    (project / "docs" / "lonely.md").write_text("# Lonely\n")
    with pytest.raises(ValueError, match=r"lonely\.md"):
        build.stage_pages(tmp_path / "staged", project)


def test_links_of_the_source_lead_somewhere(build):
    """As GitHub shows the files."""
    assert build.broken_links([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ROOT) == []


def test_links_between_the_pages_of_the_site_lead_somewhere(build, tmp_path):
    """Anchors too; `make docs` checks the HTML that Zensical makes of these files."""
    pages = build.stage_pages(tmp_path)
    build.write_for_agents(tmp_path, pages)
    assert build.broken_links(tmp_path.rglob("*"), tmp_path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](other.md)", None),
        ("[a](other.md#two-words-and-code)", None),
        ("[a](#here)", None),
        ("[a](https://example.org/nothing)", None),
        ('<a id="named"></a> [a](#named)', None),
        ("```\n[a](nothing.md)\n```", None),
        ("[a](nothing.md)", "nothing.md: there is no such file"),
        ("![a](nothing.png)", "nothing.png: there is no such file"),
        ("[a](other.md#three-words)", "other.md#three-words: there is no such anchor"),
        ("[a](#there)", "#there: there is no such anchor"),
        ("[a](/other.md)", None),
        ("[a](folder)", "folder: there is no such file"),
        ("| t |\n|---|\n| [a](nothing.md) |", "nothing.md: there is no such file"),
    ],
)
def test_a_broken_link_is_found(build, tmp_path, text, problem):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.md").write_text("# Two words, and `code`\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n{text}\n")
    assert build.broken_links([page], tmp_path) == ([f"{page}: {problem}"] if problem else [])


def test_a_broken_link_is_found_in_html(build, tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<h1 id="here">x</h1><a href="#here">a</a><a href="#there">b</a><script src="none.js"></script>')
    assert [message.split(": ", 1)[1] for message in build.broken_links([page], tmp_path)] == [
        "#there: there is no such anchor",
        "none.js: there is no such file",
    ]


def test_markdown_is_adapted_to_python_markdown(build, project, tmp_path):
    """Lists without an empty line, nested lists and pipes in code of tables render as on GitHub."""
    text = "# T\n\ntext:\n- a\n  - b\n\n| c |\n|---|\n| `x\\|y` \\| z |\n\n```\n- kept\n| `x\\|y` |\n```\n"
    (project / "docs" / "glossary.md").write_text(text + "<!-- not run: a reason -->\n```bash\nfalse\n```\n")
    pages = {page.name: page.text for page in build.stage_pages(tmp_path / "staged", project)}
    adapted = "# T\n\ntext:\n\n- a\n    - b\n\n| c |\n|---|\n| `x|y` \\| z |\n\n```\n- kept\n| `x\\|y` |\n```\n"
    assert pages["glossary.md"] == adapted + "```bash\nfalse\n```\n"


# --- pages made from the code -----------------------------------------------------------------------------


def test_every_command_and_option_is_on_the_page_of_commands(reference):
    sections = dict(re.findall(r"^## minisft (\w+)\n(.*?)(?=^## |\Z)", reference.commands_page(), re.M | re.S))
    assert list(sections) == list(VERBS)
    for name, verb in VERBS.items():
        for action in verb.parser(name)._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f"`{option}" in sections[name], f"{name} {option}"
    assert "| `--port N` | Default 8000; 0 takes a free one. |" in sections["serve"]


def test_every_key_is_on_the_page_of_the_recipe_with_its_type_and_default(reference):
    page = reference.with_types((ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"))
    assert "| `max_length` | whole number: tokens | 2048 |" in page
    assert "| `learning_rate` | number: per optimizer step | 8.0e-6 |" in page
    assert "| `strategy` | choice | vanilla |" in page
    names = [key.name for key in reference.recipe_keys()]
    assert {"model", "data.source", "training.lora", "training.lora.rank", "evaluation.top_p"} <= set(names)
    assert set(reference.UNITS) <= set(names)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("| `max_length` | 2048 |", "| `max_length` | 1024 |", "gives 1024 as default of `data.max_length`"),
        ("| `max_length` |", "| `longest` |", "`data.longest`, which is no key"),
        ("`drop` skips the row, ", "", r"does not name the values \['drop'\] of `data.overflow`"),
    ],
)
def test_a_page_of_the_recipe_that_contradicts_the_code_is_refused(reference, old, new, problem):
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(ValueError, match=problem):
        reference.with_types(text.replace(old, new))


def test_a_key_that_the_page_of_the_recipe_lacks_is_named(reference):
    lines = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines(keepends=True)
    with pytest.raises(ValueError, match=r"does not document data\.overflow"):
        reference.with_types("".join(line for line in lines if not line.startswith("| `overflow`")))


def test_every_name_of_the_package_is_on_the_page_of_the_python_api(reference):
    page = reference.python_page()
    for name in minisft.__all__:
        assert name == "__version__" or f"## minisft.{name}\n" in page, name
    assert "### Run.chat\n" in page
    assert "    temperature: float = 0.0,\n" in page
    assert "- `temperature`: 0 is greedy decoding, above 0 samples.\n" in page


def test_the_pictures_of_the_concepts_are_those_of_the_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    pictures = importlib.import_module("draw_concepts").PICTURES
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    for name, draw in pictures.items():
        path = ROOT / "docs" / "images" / f"concept-{name}.svg"
        assert path.read_text(encoding="utf-8") == draw().svg(), "run python scripts/draw_concepts.py"
        assert f"(images/{path.name})" in page


# --- for agents -------------------------------------------------------------------------------------------


def test_llms_txt_has_the_form_of_llmstxt_org(build, tmp_path):
    pages = build.stage_pages(tmp_path)
    build.write_for_agents(tmp_path, pages)
    lines = (tmp_path / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# MiniSFT"
    assert lines[2].startswith("> ")
    entries = [line for line in lines[3:] if line and not line.startswith("## ")]
    links = [link for line in entries for link in re.findall(r"^- \[.+\]\((\w+\.md)\): (.{20,400})$", line)]
    assert [name for name, _ in links] == [page.name for page in pages]
    assert len(entries) == len(links)
    full = (tmp_path / "llms-full.txt").read_text(encoding="utf-8")
    assert all(page.text in full for page in pages)


# --- the site itself --------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".venv-docs" / ".ready").exists(), reason="`make docs` has not been run here")
def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("docs", "scripts", "src", "examples", "recipes", "mkdocs.yml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "own", ignore=shutil.ignore_patterns("__pycache__"))
    python = ROOT / ".venv-docs" / "bin" / "python"
    (tmp_path / "scripts").unlink()
    (tmp_path / "own").rename(tmp_path / "scripts")  # the script's own folder says where the project is
    (tmp_path / "mkdocs.yml").unlink()
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    built = subprocess.run(
        [python, tmp_path / "scripts" / "build_docs.py"], capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in (built.stdout + built.stderr).lower()
    assert (tmp_path / "site" / "index.html").is_file()
    assert "fonts.googleapis" not in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
