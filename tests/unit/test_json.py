"""`--json`: stdout is one JSON document of the documented shape, and everything else is on stderr."""

import json
import re
from pathlib import Path

import pytest

from minisft.cli import VERBS
from tests.command import refused, run

ROOT = Path(__file__).parents[2]


def printed(capsys, *words):
    found = run(capsys, *words)
    assert found.status == 0, found.err
    return json.loads(found.out), found.err


def test_prepare_prints_the_ledger(recipe_file, tmp_path, capsys):
    ledger, messages = printed(capsys, "prepare", recipe_file, "--json")
    assert ledger == json.loads((tmp_path / "run" / "dataset" / "ledger.json").read_text())
    assert messages.startswith(f"minisft prepare {recipe_file}")
    assert "tokens" in messages


def test_inspect_prints_rows_with_their_tokens(run_folder, capsys):
    found, _ = printed(capsys, "inspect", run_folder, "--row", "1", "--row", "0", "--json")
    first, second = found["rows"]
    assert (first["split"], first["row"], second["row"]) == ("train", 1, 0)
    assert set(first) == {"split", "row", "id", "location", "rendered", "findings", "tokens", "answer"}
    assert set(first["tokens"][0]) == {"id", "text", "supervised", "special"}
    assert {token["supervised"] for token in first["tokens"]} == {True, False}


def test_report_prints_its_paths(run_folder, tmp_path, capsys):
    found, _ = printed(capsys, "report", run_folder, "--to", tmp_path / "page", "--json")
    assert found == {
        "page": str(tmp_path / "page" / "report.html"),
        "results": str(tmp_path / "page" / "results.md"),
    }
    assert all(Path(path).is_file() for path in found.values())


def test_export_prints_what_verified_json_says(run_folder, tmp_path, capsys):
    folder = tmp_path / "exported"
    found, messages = printed(capsys, "export", run_folder, folder, "--engine", "transformers", "--json")
    assert found == {"folder": str(folder), **json.loads((folder / "verified.json").read_text())}
    assert found["engine"]["transformers"]["status"] == "ok"
    assert "written: " in messages


def test_push_prints_the_folder_that_would_be_sent(run_folder, capsys):
    found, _ = printed(capsys, "push", run_folder, "org/name", "--dry-run", "--engine", "none", "--json")
    assert (Path(found["folder"]) / "config.json").is_file()


def test_evaluate_prints_the_results(run_folder, capsys):
    found, _ = printed(capsys, "evaluate", run_folder, "--json")
    assert found == json.loads((run_folder / "evaluation" / "results.json").read_text())


def test_compare_prints_the_comparison(recipe_file, tmp_path, capsys):
    words = ("compare", recipe_file, "--vary", "training.max_steps=1", "--no-evaluate", "--json")
    found, messages = printed(capsys, *words)
    assert found == json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert "written: " in messages


def test_submit_prints_what_it_wrote(recipe_file, tmp_path, capsys):
    found, messages = printed(capsys, "submit", recipe_file, "--time", "90", "--gpus-per-node", "0", "--json")
    assert found == {
        "script": str(tmp_path / "run.sbatch"),
        "recipe": str(tmp_path / "run.recipe.yaml"),
        "evaluation_script": str(tmp_path / "run.evaluate.sbatch"),
        "job": None,
        "evaluation_job": None,
    }
    assert all(Path(found[name]).is_file() for name in ("script", "recipe", "evaluation_script"))
    assert f"\n  sbatch {tmp_path / 'run.sbatch'}\n" in messages


def test_an_error_leaves_stdout_empty(tmp_path, capsys):
    for verb in ("prepare", "report", "inspect", "compare", "submit"):
        words = (verb, tmp_path / "none.yaml", "--json", *(("--time", "90") if verb == "submit" else ()))
        assert run(capsys, *words).out == ""
        refused(capsys, *words)


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if "--json" in verb.parser(name).format_help()])
def test_every_shape_is_documented(verb):
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{verb}` \|", page, re.MULTILINE)
