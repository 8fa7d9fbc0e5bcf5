"""Preparing through the command line: what is cached is answered at once, and a run keeps to its data."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisft.run_folder import RunFolder
from tests.tiny import minisft, write_recipe

PACKAGE = Path(__file__).parents[2] / "src" / "minisft"


@pytest.fixture
def recipe(tmp_path, tiny_model, conversations):
    """A recipe with data of its own, prepared."""
    own = shutil.copy(conversations, tmp_path / "talks.jsonl")
    recipe = write_recipe(tmp_path, tiny_model, own, "{precision: fp32}")
    done = minisft("prepare", recipe)
    assert done.returncode == 0, done.stderr
    return recipe


def test_what_is_cached_is_answered_without_the_heavy_libraries(recipe):
    command = [sys.executable, "-X", "importtime", "-m", "minisft", "prepare", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "prepared before" in done.stdout
    assert "train + " in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"torch", "transformers", "datasets"}


def test_a_run_whose_data_changed_is_not_resumed(recipe, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')  # as a run has that was killed
    talks = tmp_path / "talks.jsonl"
    before, kept = talks.read_bytes(), (run.dataset / "ledger.json").read_bytes()
    talks.write_bytes(before.replace(b"talk-1", b"talk-x"))
    for words in (["train", recipe, "--resume"], ["prepare", recipe]):
        refused = minisft(*words)
        assert refused.returncode == 2, refused.stderr
        assert f"changed since then: {talks}" in refused.stderr
        assert "--force" in refused.stderr
        assert (run.dataset / "ledger.json").read_bytes() == kept
    talks.write_bytes(before)
    assert minisft("prepare", recipe).returncode == 0


@pytest.mark.parametrize("changed", ["data/formats.py", "data/renderers/mistral.py"])
def test_another_version_of_the_data_code_prepares_again(recipe_file, tmp_path, changed):
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "minisft", ignore=shutil.ignore_patterns("__pycache__"))
    words = ("prepare", recipe_file)
    assert minisft(*words, PYTHONPATH=str(source)).returncode == 0
    assert "(prepared before)" in minisft(*words, PYTHONPATH=str(source)).stdout
    with (source / "minisft" / changed).open("a") as file:
        file.write("# another version\n")
    done = minisft(*words, PYTHONPATH=str(source))
    assert done.returncode == 0, done.stderr
    assert "(prepared before)" not in done.stdout
