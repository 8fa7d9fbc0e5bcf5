"""`minisft plan` as a user has it: a table to read, JSON, and what is wrong with what was asked for."""

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.command import refused, run

MODELS = Path(__file__).parents[1] / "unit" / "planning" / "models"
STRATEGIES = ("vanilla", "zero1", "zero2", "zero3")


def test_70b_on_64_gpus_from_its_configuration_alone(capsys, recipe_file):
    begun = time.perf_counter()
    words = (recipe_file, f"model={MODELS / 'llama3-70b'}", "training.gradient_checkpointing=true")
    status, out, err = run(
        capsys, "plan", *words, "training.precision=bf16", "--gpu", "h100", "--count", 8, "--nodes", 8
    )
    assert status == 0, err
    assert time.perf_counter() - begun < 60
    assert not list(MODELS.rglob("*.safetensors"))
    lines = out.splitlines()
    assert "70.55B parameters, 70.55B trained, bf16, gradient checkpointing" in lines[0]
    assert "64 x h100 on 8 node(s)" in lines[1]
    assert "the data is not prepared" in out
    assert "choice: zero3 fits" in out
    for strategy in STRATEGIES:
        assert sum(line.split()[:1] == [strategy] for line in lines) >= 3, strategy
    tables = lines[lines.index("Memory of the largest process, GB") : lines.index("* does not fit.")]
    assert max(len(line) for line in tables if not line.startswith(("choice", "largest row"))) <= 96


BIG = (f"model={MODELS / 'llama3-70b'}", "training.gradient_checkpointing=true", "training.precision=bf16")


def test_70b_on_8_gpus_says_what_zero3_needs_and_what_would_fit(capsys, recipe_file):
    status, out, err = run(capsys, "plan", recipe_file, *BIG, "--gpu", "h100", "--count", 8)
    assert status == 0, err
    assert "8 x h100 on 1 node(s)" in out
    assert "nothing fits: zero3 needs the least memory, " in out
    assert "32 h100 on 4 nodes with training.strategy=zero3" in out


def test_processes_that_share_rows_keep_their_part_of_the_activations(capsys, recipe_file):
    words = (recipe_file, *BIG, "training.processes=8", "training.row_tokens=65536", "--gpu", "h100", "--count", 8)
    activations = {}
    for size in (1, 8):
        status, out, err = run(capsys, "plan", *words, f"training.sequence_parallel={size}", "--json")
        assert status == 0, err
        planned = {row["strategy"]: row for row in json.loads(out)["strategies"] if not row["offload"]}
        activations[size] = planned["zero3"]["memory_bytes"]["activations"]
    assert activations[8] == pytest.approx(activations[1] / 8, rel=1e-3)
    status, _, err = run(capsys, "plan", *words[:-1], 6, "training.sequence_parallel=4")
    assert status == 2
    assert "training.sequence_parallel: 4 does not divide the 6 processes of the plan" in err


def test_this_machine_with_its_data(capsys, recipe_file):
    status, out, _ = run(capsys, "plan", recipe_file)
    assert status == 0
    assert "8 steps of" in out
    assert "prepared 30 conversations" in out
    assert "choice: vanilla fits" in out
    status, out, _ = run(capsys, "plan", recipe_file, "--json")
    planned = json.loads(out)
    assert planned["choice"] == "vanilla"
    assert planned["steps"] == 8
    assert [row["strategy"] for row in planned["strategies"]] == list(STRATEGIES)
    assert all(row["memory_bytes"]["peak"] > 0 and row["fits"] for row in planned["strategies"])


def test_an_artificial_limit(capsys, recipe_file):
    status, out, _ = run(capsys, "plan", recipe_file, "training.memory_limit_gb=0.1")
    assert status == 0
    assert "nothing fits" in out
    assert "0.1 GB are usable" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h1000"], "use one of h100, h100-pcie, h100-nvl, h200, "),
        (["--gpu", "h100", "--count", "0"], "give --count 1 or more"),
        (["--gpu", "h100", "--count", "-3"], "give --count 1 or more"),
        (["--gpu", "h100", "--count", "24"], "--count 8 --nodes 3"),
        (["--gpu", "h100", "--nodes", "0"], "give --nodes 1 or more"),
        (["--gpu", "cpu", "--nodes", "2"], "give --nodes 1"),
        (["--gpu", "cpu", "--count", "4096"], "cores on this machine"),
        (["--gpu", "cpu", "training.precision=fp16"], "fp16 is for GPUs"),
        (["--count", "many"], "--count: invalid int value"),
        (["training.memory_limit_gb=0"], "memory_limit_gb"),
    ],
)
def test_what_cannot_be_planned(capsys, recipe_file, words, said):
    assert said in refused(capsys, "plan", recipe_file, *words)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_configuration_that_lacks_a_field(capsys, recipe_file, tmp_path, field):
    folder = broken(tmp_path, lambda config: config.pop(field))
    said = refused(capsys, "plan", recipe_file, f"model={folder}", "--gpu", "h100")
    assert f"the field {field} is missing" in said
    assert "config.json" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.pop("model_type"), "cannot be read"),
        (lambda config: config.update(model_type="no-such-model"), "cannot be read"),
        (lambda config: config.update(hidden_size="wide"), "cannot be"),
        (lambda config: config.update(num_key_value_heads=3), "cannot be built"),
    ],
)
def test_a_configuration_that_makes_no_sense(capsys, recipe_file, tmp_path, change, said):
    folder = broken(tmp_path, change)
    assert said in refused(capsys, "plan", recipe_file, f"model={folder}", "--gpu", "h100")


def test_a_configuration_that_is_no_json(capsys, recipe_file, tmp_path):
    folder = broken(tmp_path, lambda config: None)
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in refused(capsys, "plan", recipe_file, f"model={folder}", "--gpu", "h100")


def broken(tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(MODELS / "llama3-8b", folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
