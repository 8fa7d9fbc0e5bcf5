"""The verbs that read a run: read-only runs, pages and their places, options and overrides, the table of compare."""

import contextlib
import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from minisft.cli import main
from minisft.console import console
from minisft.processes import CompletedVerb
from tests.command import run
from tests.tiny import write_recipe


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- read-only runs -----------------------------------------------------------------------------------------

READ_ONLY: list[Path] = []  # folders in which every write is refused, also for root, whom permissions do not bind
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _refuse_writes(event, arguments):
    """An audit hook of Python (PEP 578), which sees every file that Python opens or changes."""
    if not READ_ONLY or not (event == "open" or event in _CHANGES):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
        return
    for path in arguments[:2]:
        if isinstance(path, (str, os.PathLike)) and any(Path(path).is_relative_to(folder) for folder in READ_ONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(_refuse_writes)


@pytest.fixture
def read_only(run_folder):
    READ_ONLY.append(run_folder)
    yield run_folder
    READ_ONLY.clear()


def test_the_fixture_refuses_every_write(read_only):
    for write in (
        lambda: (read_only / "new").write_text("x"),
        lambda: (read_only / "folder").mkdir(),
        lambda: (read_only / "metrics.jsonl").unlink(),
        lambda: os.close(os.open(read_only / ".lock", os.O_RDWR | os.O_CREAT)),
        lambda: (read_only / "metrics.jsonl").rename(read_only / "moved"),
    ):
        with pytest.raises(OSError, match="Read-only file system"):
            write()
    assert (read_only / "metrics.jsonl").read_text()


def test_inspect_needs_no_write(read_only, capsys):
    status, printed, said = run(capsys, "inspect", read_only, "--count", "1")
    assert status == 0, said
    assert "train row 0" in printed


def test_report_of_a_read_only_run_is_written_elsewhere(read_only, tmp_path, capsys):
    before = contents(read_only)
    status, _, said = run(capsys, "report", read_only)
    assert status == 2
    assert "the report cannot be written there (Read-only file system)" in said
    assert f"minisft report {read_only} --to FOLDER" in said
    for _ in range(2):  # the second time it replaces its own
        status, printed, said = run(capsys, "report", read_only, "--to", tmp_path / "elsewhere")
        assert status == 0, said
    assert f"written: {tmp_path / 'elsewhere' / 'report.html'}" in printed
    written = {path.name for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    assert written == {"report.html", "results.md", "loss.png", "scores.png"}
    assert "![loss](evaluation/loss.png)" in (tmp_path / "elsewhere/results.md").read_text()
    assert contents(read_only) == before


@pytest.mark.parametrize("verb", ["chat", "export"])
def test_chat_and_export_only_read_a_run(read_only, tmp_path, capsys, verb):
    options = ("--message", "hi", "--max-new-tokens", "2") if verb == "chat" else (tmp_path / "exported",)
    assert run(capsys, verb, read_only, *options)[0] == 0


@pytest.mark.parametrize("name", ["report.html", "thesis.tex"])
def test_a_report_is_not_written_over_other_files(run_folder, tmp_path, capsys, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    status, _, said = run(capsys, "report", run_folder, "--to", folder)
    assert status == 2
    assert "holds something other than a report" in said
    assert contents(folder) == {name: b"mine"}
    status, _, said = run(capsys, "report", run_folder, "--to", folder / name)
    assert status == 2
    assert "this is a file" in said


# --- the page of inspect ------------------------------------------------------------------------------------


def test_a_page_of_inspect_replaces_nothing_but_such_a_page(run_folder, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "base.yaml"
    other = tmp_path / "other.html"
    recipe.write_text("model: mine\n")
    other.write_text("<!doctype html>\n<title>mine</title>\n")
    for path in (recipe, other):
        before = path.read_text()
        status, _, said = run(capsys, "inspect", run_folder, "--html", path)
        assert status == 2
        assert "is not a page that inspect wrote" in said
        assert path.read_text() == before
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        assert run(capsys, "inspect", run_folder, "--html", "~/rows.html")[0] == 0
    assert "what the model will learn from" in (tmp_path / "rows.html").read_text()


def test_a_page_of_inspect_where_there_can_be_none(run_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    READ_ONLY.append(tmp_path / "closed")
    try:
        for path, said in (
            ("/", "this is a folder"),
            (tmp_path, "this is a folder"),
            (tmp_path / "file" / "rows.html", "cannot be written there"),
            (tmp_path / "closed" / "rows.html", "cannot be written there (Read-only"),
            (tmp_path / ("x" * 300), "cannot be written there"),
        ):
            status, _, error = run(capsys, "inspect", run_folder, "--html", path)
            assert status == 2
            assert said in error
    finally:
        READ_ONLY.clear()


@pytest.mark.parametrize("count", ["0", "-3", "some"])
def test_a_count_of_rows_is_at_least_one(run_folder, capsys, count):
    status, _, said = run(capsys, "inspect", run_folder, "--count", count)
    assert status == 2
    assert "--count: must be" in said


# --- overrides that a verb does not read --------------------------------------------------------------------


def test_overrides_that_a_verb_does_not_read_are_named(run_folder, tmp_path, tiny_model, conversations, capsys):
    recipe = write_recipe(tmp_path, tiny_model, conversations, "{max_steps: 1, precision: fp32}")
    message = ("--message", "hi", "--max-new-tokens", "1")
    for words, unread in (
        (
            ("evaluate", run_folder, "training.epochs=3", "data.limit=5", "evaluation.limit=2"),
            "training.epochs, data.limit",
        ),
        (("evaluate", run_folder, "training.precision=fp32", "evaluation={limit: 2, max_new_tokens: 4}"), None),
        (("inspect", run_folder, "training.epochs=3"), "training.epochs"),
        (("inspect", run_folder, "output=elsewhere"), "output"),
        (("chat", run_folder, "training.epochs=3", *message), "training.epochs"),
        (("prepare", recipe, "evaluation.turns=all", "data.limit=20"), "evaluation.turns"),
        (("report", run_folder, "evaluation.limit=1"), "evaluation.limit"),
        (("export", run_folder, tmp_path / "exported", "seed=1"), "seed"),
        (("chat", recipe, f"output={run_folder}", "seed=1", *message), "seed"),
        (("train", recipe, f"output={tmp_path / 'other'}", "evaluation.limit=1"), None),
    ):
        status, _, said = run(capsys, *words)
        assert status == 0, said
        notes = [line for line in said.splitlines() if line.startswith("note: ") and "does not read" in line]
        assert notes == ([] if unread is None else [f"note: {words[0]} does not read {unread}"])


# --- adapters and templates ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters_run(tmp_path_factory, tiny_model, conversations):
    folder = tmp_path_factory.mktemp("adapters")
    recipe = write_recipe(folder, tiny_model, conversations, "{max_steps: 1, precision: fp32, lora: {rank: 2}}")
    assert main(["train", str(recipe)]) == 0
    return folder / "run"


@pytest.mark.parametrize("verb", ["prepare", "train", "plan", "evaluate"])
@pytest.mark.parametrize("part", ["model", "checkpoints/checkpoint-1"])
def test_adapters_as_a_model_are_refused_with_the_command_that_merges_them(
    adapters_run, tmp_path, conversations, capsys, verb, part
):
    recipe = write_recipe(tmp_path, adapters_run / part, conversations, "{max_steps: 1, precision: fp32}")
    words = (recipe,) if verb != "evaluate" else (adapters_run, f"model={adapters_run / part}")
    status, _, said = run(capsys, verb, *words)
    assert status == 2
    assert "this folder holds LoRA adapters" in said
    assert f"minisft export {adapters_run.resolve()} FOLDER" in said


def test_adapters_that_are_copied_keep_their_number_format(adapters_run, tmp_path, capsys):
    words = ("export", adapters_run, tmp_path / "exported", "--no-merge")
    status, _, said = run(capsys, *words, "--dtype", "bf16")
    assert status == 2
    assert "--no-merge --dtype" in said
    assert not (tmp_path / "exported").exists()
    assert run(capsys, *words)[0] == 0
    assert (tmp_path / "exported/adapter_config.json").exists()


def test_chat_takes_a_template_for_a_model_without_one(run_folder, tiny_model, tmp_path, capsys):
    message = ("--message", "hi", "--max-new-tokens", "4")
    status, _, said = run(capsys, "chat", tiny_model, *message)
    assert status == 2
    assert "no chat template of its own" in said
    assert "--template mistral|" in said
    assert "data.template" not in said
    status, _, said = run(capsys, "chat", tiny_model, *message, "--template", "mistrall")
    assert status == 2
    assert "minisft: --template: there is no template 'mistrall'" in said
    model = shutil.copytree(run_folder / "model", tmp_path / "bare")
    (model / "chat_template.jinja").rename(tmp_path / "own.jinja")
    trained = run(capsys, "chat", run_folder, *message)
    assert trained[0] == 0
    for template in ("mistral", tmp_path / "own.jinja"):
        status, printed, said = run(capsys, "chat", model, *message, "--template", template)
        assert status == 0, said
        assert printed == trained[1]


# --- the table of a comparison ------------------------------------------------------------------------------


def test_the_table_of_a_comparison_is_complete_at_80_and_120_columns(
    tmp_path, tiny_model, conversations, capsys, monkeypatch
):
    def run_verb(words, log, follow):  # without a process of its own, which takes seconds
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return CompletedVerb(main(words), said.getvalue())

    monkeypatch.setattr("minisft.comparison.compare.run_verb", run_verb)
    recipe = write_recipe(tmp_path, tiny_model, conversations, "{max_steps: 2, precision: fp32}")
    words = ("compare", recipe, "--vary", "training.learning_rate=1e-3,2e-3", "--vary", "training.weight_decay=0.01")
    for width in (80, 120):  # the second time all is done already
        monkeypatch.setattr(console, "width", width)
        status, printed, said = run(capsys, *words)
        assert status == 0, said
        table = printed[printed.rindex("evaluate, ") if width == 80 else 0 :]
        heads = [line for line in table.splitlines() if "s/step" in line or "test loss" in line]
        assert all(len(line) <= width for line in heads)
        assert "…" not in table
        text = " ".join(table.split())
        variant = json.loads((tmp_path / "run/comparison.json").read_text())["variants"][1]
        for figure in ("s/step", "tokens/s", "GB", "final loss", "test loss", "BLEU", "chrF"):
            assert figure in text
        for key, form in (("final_loss", ".4f"), ("test_loss", ".4f"), ("seconds_per_step", ".2f")):
            assert format(variant[key], form) in text
