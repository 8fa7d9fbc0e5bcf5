"""`runs`: every run below a folder with its state, read without torch; broken ones are named with the reason."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import minisft
from minisft.files import hold_lock
from tests.command import refused, run
from tests.terminal import run_in_terminal


@pytest.fixture
def outputs(scored_run, tmp_path):
    """Return a folder with a copy of a scored run under `a`."""
    shutil.copytree(scored_run, tmp_path / "outputs" / "a")
    return tmp_path / "outputs"


def only(folder):
    [summary] = minisft.runs(folder)
    return summary


def test_an_evaluated_run(outputs):
    summary = only(outputs)
    results = json.loads((outputs / "a" / "evaluation" / "results.json").read_text())
    assert (summary.folder, summary.state, summary.reason) == (str(outputs / "a"), "evaluated", "")
    assert (summary.step, summary.steps) == (4, 4)
    assert summary.loss == json.loads((outputs / "a" / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert (summary.best, summary.metric, summary.checkpoint) == (results["best"], "bleu", "checkpoint-4")
    assert summary.score == max(entry["bleu"]["score"] for entry in results["checkpoints"])
    assert summary.base_score == results["base"]["bleu"]["score"]
    assert summary.reliable is False
    assert summary.bytes == sum(path.stat().st_size for path in (outputs / "a").rglob("*") if path.is_file())
    assert abs(datetime.fromisoformat(summary.changed).timestamp() - max(
        path.stat().st_mtime for path in (outputs / "a").rglob("*") if path.is_file())) <= 1  # fmt: skip


def test_the_states_of_a_run(outputs):
    root = outputs / "a"
    shutil.rmtree(root / "evaluation")
    assert only(outputs).state == "trained"
    shutil.rmtree(root / "model")
    assert only(outputs).state == "stopped"
    with hold_lock(root / ".lock"):
        assert only(outputs).state == "training"
    shutil.rmtree(root / "checkpoints")
    (root / "metrics.jsonl").unlink()
    assert only(outputs).state == "prepared"
    with hold_lock(root / ".lock"):
        assert only(outputs).state == "preparing"
    shutil.rmtree(root / "dataset")
    assert only(outputs).state == "unprepared"
    root.rename(outputs / "a.old-1")
    with hold_lock(outputs / "a.old-1" / ".lock"):
        assert only(outputs).state == "replaced"


def test_the_last_step_is_known_from_the_epochs(outputs):
    recipe, metrics = outputs / "a" / "recipe.yaml", outputs / "a" / "metrics.jsonl"
    recipe.write_text(recipe.read_text().replace("max_steps: 4", "max_steps: null").replace("epochs: 8", "epochs: 2.5"))
    line = json.loads(metrics.read_text().splitlines()[-1])
    metrics.write_text(json.dumps({**line, "step": 7, "epoch": 7 / 12}) + "\n")
    assert (only(outputs).step, only(outputs).steps) == (7, 30)


def break_recipe(root):
    (root / "recipe.yaml").write_text((root / "recipe.yaml").read_text() + "nonsense: 1\n")


def remove_recipe(root):
    (root / "recipe.yaml").unlink()


def break_results(root):
    (root / "evaluation" / "results.json").write_text("{")


def empty_results(root):
    (root / "evaluation" / "results.json").write_text('{"base": {}, "constant": {}, "checkpoints": [], "best": "b"}')


def odd_metrics(root):
    (root / "metrics.jsonl").unlink()
    (root / "metrics.jsonl").mkdir()


def pipe_in_place_of_metrics(root):
    (root / "metrics.jsonl").unlink()
    os.mkfifo(root / "metrics.jsonl")


def link_in_place_of_lock(root):
    (root / ".lock").unlink()
    (root / ".lock").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (break_recipe, "unknown key"),
        (remove_recipe, "not a run folder"),
        (break_results, "damaged"),
        (empty_results, "unknown form"),
        (odd_metrics, "not a regular file"),
        (pipe_in_place_of_metrics, "not a regular file"),
        (link_in_place_of_lock, "lock file"),
    ],
)
def test_a_broken_run_is_named_and_the_others_are_listed(outputs, capsys, breaks, reason):
    shutil.copytree(outputs / "a", outputs / "b")
    breaks(outputs / "a")
    states = {Path(found.folder).name: found for found in minisft.runs(outputs)}
    assert states["b"].state == "evaluated"
    assert states["a"].state == "broken"
    assert reason in states["a"].reason.lower()
    found = run(capsys, "runs", outputs)
    assert found.status == 0
    assert f"a: {states['a'].reason}" in found.out.replace("\n", " ")


def test_damaged_metrics_are_left_out(outputs):
    (outputs / "a" / "metrics.jsonl").write_bytes(b"\xff\n{}\n[]\n" + b'{"step": 1e999}\n')
    assert (only(outputs).state, only(outputs).step) == ("evaluated", None)


def test_folders_below_are_searched_and_what_is_no_run_is_left_out(outputs, tmp_path):
    shutil.copytree(outputs / "a", outputs / "group" / "deep" / "b")
    shutil.copytree(outputs / "a", outputs / "a" / "compare" / "zero1")
    (outputs / "notes").mkdir()
    (outputs / "recipe.yaml").write_text("model: m\n")  # a recipe of the user's own
    (outputs / "link").symlink_to(outputs / "a")
    (outputs / "loop").symlink_to(outputs)
    found = sorted(os.path.relpath(summary.folder, outputs) for summary in minisft.runs(outputs))
    assert found == ["a", "a/compare/zero1", "group/deep/b"]
    assert only(outputs / "group").folder == str(outputs / "group" / "deep" / "b")
    assert {summary.folder for summary in minisft.runs(outputs / "a")} >= {str(outputs / "a")}


def test_json_on_stdout(outputs, capsys):
    found = run(capsys, "runs", outputs, "--json")
    printed = json.loads(found.out)
    assert printed["folder"] == str(outputs)
    assert printed["runs"] == [summary.as_dict() for summary in minisft.runs(outputs)]
    assert found.err == ""


def test_the_table(outputs, capsys):
    (outputs / "a").rename(outputs / "a\x1b[31m [bold]")
    printed = run(capsys, "runs", outputs).out
    assert "\x1b" not in printed
    assert "[bold]" in printed
    assert "4 of 4" in printed


@pytest.mark.parametrize(
    ("width", "columns"),
    [(60, ["run", "state", "step", "best"]), (120, ["run", "state", "step", "loss", "best", "size", "changed"])],
)
def test_a_narrow_terminal_gets_fewer_columns(outputs, width, columns):
    (outputs / "a").rename(outputs / "run-7")
    session = run_in_terminal(["-m", "minisft", "runs", outputs], {"COLUMNS": str(width)})
    heads, _, row, *_ = [line for line in session.last.splitlines() if line.strip()]
    assert heads.split() == columns
    assert row.split()[0] == "run-7"


def test_an_empty_folder_and_none(tmp_path, capsys, monkeypatch):
    assert run(capsys, "runs", tmp_path).out == f"There are no runs in {tmp_path}.\n"
    assert "there is no such folder" in refused(capsys, "runs", tmp_path / "none")
    (tmp_path / "file").touch()
    refused(capsys, "runs", tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    assert "outputs: there is no such folder" in refused(capsys, "runs")


def test_it_imports_no_heavy_library(outputs):
    code = (
        "import sys; from minisft.cli import main; main(['runs', sys.argv[1]]);"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(outputs)], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"
