"""`compare` through the command line: variants beside each other, one that fails, and a second call."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import minisft, write_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are started as on Linux")
SETTINGS = "{max_steps: 2, learning_rate: 1.0e-3, precision: fp32, batch_size: 4}"


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory, tiny_model):
    """A model with a weight that is no number: it loads, and its first loss is NaN."""
    folder = tmp_path_factory.mktemp("spoiled") / "model"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_model, spoiled, conversations):
    folder = tmp_path_factory.mktemp("compare")
    recipe = write_recipe(folder, tiny_model, conversations, SETTINGS)
    words = ["compare", recipe, "--vary", f"model={tiny_model},{spoiled}", "--vary", "training.weight_decay=0.0,-1"]
    return folder / "run", words, minisft(*words)


def test_a_variant_that_fails_is_named_and_the_others_continue(compared, tiny_model):
    output, _, done = compared
    assert done.returncode == 2, done.stderr
    found = {variant["name"]: variant for variant in read(output / "comparison.json")["variants"]}
    statuses = [(variant["status"], variant["failed_at"]) for variant in found.values()]
    assert statuses == [("done", None), ("failed", "recipe"), ("failed", "train"), ("failed", "recipe")]
    good, _, bad, _ = found.values()
    assert "step 1: the loss is nan" in bad["error"]
    assert f"{bad['name']}: train failed: step 1: the loss is nan" in done.stderr
    assert "Traceback" not in done.stderr
    assert good["steps"] == 2
    assert good["communication_mb"] == 0
    assert good["test_loss"] > 0
    assert set(good["bleu"]) == {"score", "low", "high", "reliable"}, "three held-out rows are too few"
    page = (output / "comparison.html").read_text()
    assert "the loss is nan" in page
    assert bad["name"] in done.stdout


def test_a_variant_is_a_complete_run_folder(compared):
    output, _, _ = compared
    run = next(path for path in (output / "compare").iterdir() if (path / "model").is_dir())
    assert minisft("report", run).returncode == 0
    assert (run / "report.html").exists()


def test_called_again_only_what_failed_is_run(compared):
    output, words, _ = compared
    logs = {path.name: path.read_text() for path in (output / "compare").glob("*.log")}
    again = minisft(*words)
    assert again.returncode == 2
    assert "train is done already" in again.stdout
    assert "evaluate is done already" in again.stdout
    changed = [path.name for path in (output / "compare").glob("*.log") if path.read_text() != logs[path.name]]
    assert len(changed) == 1
    refused = minisft(*words[:2], "--vary", f"model={words[3].partition('=')[2].split(',')[0]}", "--vary",
                      "training.weight_decay=0.0", "training.batch_size=2", "training.gradient_accumulation=2")  # fmt: skip
    assert refused.returncode == 2
    assert "holds a run with training.batch_size 4, but this variant has 2" in refused.stderr


def test_what_one_variant_prepared_serves_the_others(compared, tmp_path, tiny_model, conversations):
    recipe = write_recipe(tmp_path, tiny_model, conversations, SETTINGS)
    done = minisft("compare", recipe, "--vary", "training.learning_rate=1e-3,1e9")
    assert done.returncode == 0, done.stderr
    first, second = sorted((tmp_path / "run" / "compare").glob("*.log"))
    assert "(prepared before)" not in first.read_text()
    assert "(prepared before)" in second.read_text()
    found = read(tmp_path / "run" / "comparison.json")
    assert found["coincide"] is None
    assert found["take"] == [] or found["take"][0] in done.stdout


def test_a_folder_that_is_something_else_is_refused(compared, tmp_path, tiny_model, conversations):
    recipe = write_recipe(tmp_path, tiny_model, conversations, SETTINGS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    done = minisft("compare", recipe)
    assert done.returncode == 2
    assert "it holds 'mine.txt'" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_comparison_leaves_room_for_a_run_of_its_recipe(compared, tmp_path):
    output, words, _ = compared
    copy = shutil.copytree(output, tmp_path / "copy")
    done = minisft("prepare", words[1], f"output={copy}", "--force")
    assert done.returncode == 0, done.stderr
    assert (copy / "comparison.json").exists()
    assert (copy / "compare").is_dir()


@pytest.mark.long
def test_the_strategies_take_the_same_steps(tmp_path, tiny_model, conversations):
    recipe = write_recipe(tmp_path, tiny_model, conversations, SETTINGS)
    done = minisft("compare", recipe, "training.processes=2", "--no-evaluate", timeout=600)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "run" / "comparison.json")
    assert found["coincide"] is True
    assert "The curves coincide within 2e-4" in done.stdout
    sent = {variant["name"]: variant["communication_mb"] for variant in found["variants"]}
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters()) * 4 / 1e6
    assert sent["vanilla"] == pytest.approx(weights, rel=0.02), "all-reduce of the gradients"
    assert sent["zero1"] == pytest.approx(1.5 * weights, rel=0.02), "and an all-gather of the weights"
