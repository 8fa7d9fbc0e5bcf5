"""Resumed in the middle under another strategy or number of processes: the trajectory of the undisturbed run."""

import json
import shutil

import pytest
import torch

from minisft.models import load_model
from minisft.run_folder import RunFolder
from tests.tiny import minisft, write_recipe

# 2 epochs of 4 steps; the weight decay shows whether each parameter is in the group that it was in.
SETTINGS = "{epochs: 2, learning_rate: 1.0e-3, precision: fp32, weight_decay: 0.1, keep_optimizer: all}"
LORA = "training.lora={rank: 4}"
long = pytest.mark.long


def layout(text):
    """`zero2 x2` as overrides of a recipe whose steps are of 8 conversations."""
    strategy, processes = text.split(" x")
    size = 8 // int(processes)
    return [f"training.strategy={strategy}", f"training.processes={processes}", f"training.batch_size={size}"]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, tiny_model, conversations):
    """Return what trains a whole run under a layout, once, and the recipe."""
    folder = tmp_path_factory.mktemp("conversion")
    recipe = write_recipe(folder, tiny_model, conversations, SETTINGS)

    def train(*how):
        run = RunFolder(folder / "-".join(how).translate(str.maketrans("{}: .=", "______")))
        if not run.is_trained():
            done = minisft("train", recipe, f"output={run.root}", *how)
            assert done.returncode == 0, done.stderr
        return recipe, run

    return train


def half_of(whole, folder):
    """A run that stopped after its first epoch."""
    run = RunFolder(folder)
    shutil.copytree(whole.root, run.root)
    shutil.rmtree(run.model)
    shutil.rmtree(run.checkpoints / "checkpoint-8")
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:4]))
    return run


def files_of(checkpoint):
    return {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("first", "second", "more"),
    [
        ("zero2 x2", "vanilla x1", []),
        pytest.param("vanilla x1", "zero2 x2", [], marks=long),
        pytest.param("vanilla x1", "zero3 x2", [], marks=long),
        pytest.param("zero2 x2", "zero3 x2", [], marks=long),
        pytest.param("zero2 x2", "zero2 x1", [], marks=long),
        pytest.param("zero3 x2", "zero1 x2", [], marks=long),
        pytest.param("zero3 x2", "vanilla x2", [], marks=long),
        pytest.param("vanilla x2", "vanilla x1", [], marks=long),
        pytest.param("zero2 x2", "vanilla x1", [LORA], marks=long),
        pytest.param("vanilla x1", "zero3 x2", [LORA], marks=long),
    ],
)
def test_a_resumed_run_follows_the_same_trajectory(whole_runs, tmp_path, first, second, more):
    recipe, whole = whole_runs(*layout(first), *more)
    run = half_of(whole, tmp_path / "run")
    middle = run.checkpoints / "checkpoint-4"
    before = files_of(middle)
    done = minisft("train", recipe, f"output={run.root}", *layout(second), *more, "--resume")
    assert done.returncode == 0, done.stderr
    check_steps(run, whole)
    check_weights(run, whole)
    assert files_of(middle) == before


def check_steps(run, whole):
    ours, theirs = ([json.loads(line) for line in one.metrics.read_text().splitlines()] for one in (run, whole))
    assert [line["step"] for line in ours] == list(range(1, 9))
    for key, near in (("loss", 2e-4), ("grad_norm", 2e-4), ("learning_rate", 1e-9)):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=near), key


def check_weights(run, whole):
    ours, theirs = (load_model(one.model, dtype=torch.float32).state_dict() for one in (run, whole))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=0)


@long
def test_what_a_conversion_wrote_is_resumed_like_any_other(whole_runs, tmp_path):
    """Half under zero2 on two, a step under zero3 on two, the rest as the first: all of it the same trajectory."""
    recipe, whole = whole_runs(*layout("zero2 x2"))
    run = half_of(whole, tmp_path / "run")
    words = ["train", recipe, f"output={run.root}", "--resume", "training.save_every=6"]
    assert minisft(*words, *layout("zero3 x2")).returncode == 0
    shutil.rmtree(run.model)
    shutil.rmtree(run.checkpoints / "checkpoint-8")
    done = minisft(*words, *layout("zero2 x2"))
    assert done.returncode == 0, done.stderr
    assert "checkpoint-6, of zero3 on 2" in done.stdout + done.stderr
    check_steps(run, whole)
    check_weights(run, whole)
