"""One trajectory: however the batch is laid out, split and sharded, the steps are those of a plain padded loop."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minisft.run_folder import RunFolder
from minisft.training.resharding import ShardedState
from tests.padded import conversations_of_steps, logged_steps, padded_loop, train_rows
from tests.tiny import minisft, write_conversations, write_recipe, write_tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "trajectory.jsonl"
SETTINGS = "{learning_rate: 1.0e-3, precision: fp32, weight_decay: 0.0, row_tokens: 120, max_steps: 8}"
PACK_TOKENS = 256  # data.max_length of the recipe
LAYOUTS = ("padding-free", "packed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, conversations):
    return write_recipe(tmp_path_factory.mktemp("trajectory"), tiny_model, conversations, SETTINGS)


@pytest.fixture(scope="module")
def reference_of(recipe, tiny_model, tmp_path_factory):
    """For a layout: losses, gradient norms and weights of the padded loop in fp32, held to the same in fp64."""

    @functools.cache
    def of(layout):
        run = train(recipe, tmp_path_factory.mktemp(layout) / "run", layout)
        steps = conversations_of_steps(run, global_batch=8, pack_tokens=PACK_TOKENS if layout == "packed" else None)
        rates = [line["learning_rate"] for line in logged_steps(run)]
        model, exact = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
        expected = padded_loop(model, train_rows(run), steps, rates)
        checked = padded_loop(exact, train_rows(run), steps, rates, torch.float64)
        np.testing.assert_allclose(expected, checked, rtol=2e-5)
        return expected, dict(model.named_parameters())

    return of


def train(recipe, output, layout, *, accumulation=1, processes=1, strategy="vanilla"):
    done = minisft(
        "train", recipe, f"output={output}", f"training.packing={str(layout == 'packed').lower()}",
        f"training.strategy={strategy}", f"training.processes={processes}",
        f"training.batch_size={8 // processes // accumulation}", f"training.gradient_accumulation={accumulation}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return RunFolder(output)


CASES = [
    (layout, accumulation, processes, strategy)
    for layout in LAYOUTS
    for accumulation in (1, 4)
    for processes in (1, 2)
    for strategy in ("vanilla", "zero1", "zero2", "zero3")
]
FAST = [("packed", 4, 2, "vanilla")]


@pytest.mark.parametrize(
    ("layout", "accumulation", "processes", "strategy"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.long) for case in CASES],
)
def test_every_way_takes_the_steps_of_the_padded_loop(
    recipe, reference_of, tmp_path, layout, accumulation, processes, strategy
):
    run = train(
        recipe, tmp_path / "run", layout, accumulation=accumulation, processes=processes, strategy=strategy
    )  # fmt: skip
    expected, weights = reference_of(layout)
    ours = [(line["loss"], line["grad_norm"]) for line in logged_steps(run)]
    assert len(ours) == 8
    np.testing.assert_allclose(ours, expected, rtol=2e-4)
    final = AutoModelForCausalLM.from_pretrained(run.model)
    for name, weight in final.named_parameters():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["vanilla", "zero2"])
def test_a_short_last_batch(recipe, tmp_path, strategy):
    """25 rows in steps of 12: the third has one conversation, for one, two and three processes."""
    logs, rows = [], []
    for processes in (1, 2, 3):
        run = RunFolder(tmp_path / str(processes))
        words = [
            "-m", "minisft", "train", recipe, f"output={run.root}", f"training.strategy={strategy}",
            f"training.batch_size={12 // processes}", "training.max_steps=null", "training.epochs=2",
            "data.limit=25", "data.test_fraction=0",
        ]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        command = [sys.executable, *map(str, launcher if processes > 1 else []), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        logs.append(logged_steps(run))
        rows.append(train_rows(run))
    assert [len(log) for log in logs] == [6, 6, 6]
    tokens = [len(ids) for ids in rows[0]["input_ids"]]
    for log in logs:
        assert [line["tokens"] for line in log] == [line["tokens"] for line in logs[0]]
        assert sum(line["tokens"] for line in log[:3]) == sum(line["tokens"] for line in log[3:]) == sum(tokens)
        assert log[2]["tokens"] in tokens
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose([line[key] for line in log], [line[key] for line in logs[0]], rtol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_half_precision_begins_with_the_weights_of_the_model_and_not_with_rounded_ones(
    recipe, tiny_model, tmp_path, strategy
):
    """A step of next to nothing, and what the optimizer then holds is what was in the model's folder."""
    done = minisft(
        "train", recipe, f"output={tmp_path / 'run'}", f"training.strategy={strategy}", "training.processes=2",
        "training.precision=bf16", "training.learning_rate=1e-12", "training.max_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [checkpoint] = (RunFolder(tmp_path / "run").checkpoints).iterdir()
    state = ShardedState(checkpoint, int(strategy[-1]), 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert state.names() == {name for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(state.weight(name), weight.flatten().detach(), atol=1e-9, rtol=0)
        assert weight.ndim == 1 or not torch.equal(weight, weight.bfloat16().float())


# Relative differences of losses and gradient norms between strategies and numbers of processes in bf16: the weights are
# the same numbers, and what differs is how often a gradient is rounded.
BF16_LOSS, BF16_NORM = 1e-4, 2e-3


@pytest.mark.long
def test_in_bf16_vanilla_and_zero_take_the_same_steps(recipe, tmp_path):
    """ZeRO-1 sums rows in bf16 and is left out. And vanilla all-reduces gradients of 2 bytes."""
    losses, norms = {}, {}
    for strategy, processes in (("vanilla", 1), ("vanilla", 2), ("zero2", 2), ("zero3", 2)):
        name = f"{strategy} x{processes}"
        done = minisft(
            "train", recipe, f"output={tmp_path / name}", "training.precision=bf16", f"training.strategy={strategy}",
            f"training.processes={processes}", f"training.batch_size={8 // processes}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        logged = logged_steps(RunFolder(tmp_path / name))
        losses[name], norms[name] = ([line[key] for line in logged] for key in ("loss", "grad_norm"))
        if name == "vanilla x2":
            weights = AutoModelForCausalLM.from_pretrained(RunFolder(tmp_path / name).model)
            assert logged[-1]["communication_mb"] == pytest.approx(2 * weights.num_parameters() / 1e6, rel=0.02)
    for name in losses:
        np.testing.assert_allclose(losses[name], losses["vanilla x1"], rtol=BF16_LOSS, err_msg=name)
        np.testing.assert_allclose(norms[name], norms["vanilla x1"], rtol=BF16_NORM, err_msg=name)


def test_the_recorded_trajectory(tmp_path):
    """`MINISFT_WRITE_GOLDEN=1 pytest` writes the file again: a change of it is a change of the trajectory.

    The weights come from numpy, so that they are the same under every version of torch and transformers.
    """
    model = write_tiny_model(tmp_path / "model")
    _draw_weights(model)
    talks = write_conversations(tmp_path / "talks.jsonl", 33)
    recipe = write_recipe(tmp_path, model, talks, SETTINGS)
    run = train(recipe, tmp_path / "run", "padding-free")
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens")
    lines = [{key: line[key] for key in keys} for line in logged_steps(run)]
    if os.environ.get("MINISFT_WRITE_GOLDEN"):
        GOLDEN.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorded = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    assert len(lines) == len(recorded) == 8
    for line, golden in zip(lines, recorded, strict=True):
        assert line == pytest.approx(golden, rel=1e-5)


def _draw_weights(folder):
    from safetensors.torch import load_file, save_file

    path, random = folder / "model.safetensors", np.random.default_rng(0)
    weights = load_file(path)
    for name in sorted(weights):
        if weights[name].ndim > 1:
            drawn = random.normal(0, 0.05, tuple(weights[name].shape)).astype(np.float32)
            weights[name] = torch.from_numpy(drawn)
    save_file(weights, path, metadata={"format": "pt"})
