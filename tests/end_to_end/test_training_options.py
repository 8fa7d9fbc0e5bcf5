"""Optimizers, schedules and clipping of a recipe: what is refused before anything is written, and what it then does."""

import json
from dataclasses import replace

import pytest
import torch

from minisft.run_folder import RunFolder
from minisft.training.optimization import Lion
from tests.command import refused, run
from tests.tiny import minisft


def lines_of(folder):
    return [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]


@pytest.fixture
def train(capsys, recipe_file, tmp_path):
    """Train 4 steps in this process with the keys given; return the lines of metrics.jsonl."""

    def train_with(name, *words):
        status, _, said = run(capsys, "train", recipe_file, f"output={tmp_path / name}", "training.max_steps=4", *words)
        assert status == 0, said
        return lines_of(tmp_path / name)

    return train_with


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ("adamw_bnb_8bit", "bitsandbytes"),
        ("lion_32bit", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao"),
        ("adamw_anyprecision", "torchdistx"),
        ("galore_adamw", "a training step of its own"),
        ("apollo_adamw", "a training step of its own"),
        ("lomo", "a training step of its own"),
        ("schedule_free_adamw", "a training step of its own"),
    ],
)
def test_an_optimizer_that_does_not_work_here(capsys, recipe_file, tmp_path, optimizer, reason):
    said = refused(capsys, "train", recipe_file, f"training.optimizer={optimizer}")
    assert f"{optimizer} cannot be used here: " in said
    assert reason in said
    assert "adamw, lion, " in said
    assert optimizer not in said.split("Fix:")[1], "what does not work is offered"
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(capsys, recipe_file, tmp_path):
    pytest.importorskip("tensorboard")
    said = refused(capsys, "train", recipe_file, "training.report_to=[wandb]")
    assert "pip install wandb" in said
    assert "there is no tracker 'wandbb'" in refused(capsys, "train", recipe_file, "training.report_to=[wandbb]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("scheduler", "arguments", "reason"),
    [
        ("cosine_with_min_lr", "{min_rate: 0.1}", "valid names: num_cycles, min_lr, min_lr_rate"),
        ("cosine_with_min_lr", "{}", "min_lr"),
        ("cosine_with_min_lr", "{min_lr: 1.0}", "must be from 0 to training.learning_rate"),
        ("cosine_with_min_lr", "{min_lr: low}", "must be a number"),
        ("cosine_with_min_lr", "{min_lr_rate: 1.5}", "must be from 0 to 1"),
        ("warmup_stable_decay", "{}", "needs num_decay_steps"),
        ("warmup_stable_decay", "{num_decay_steps: 0}", "at least 1"),
        ("warmup_stable_decay", "{num_decay_steps: 3, decay_type: steep}", "steep"),
        ("constant", "{min_lr: 0}", "has no argument"),
    ],
)
def test_impossible_arguments_of_a_schedule(capsys, recipe_file, tmp_path, scheduler, arguments, reason):
    words = [f"training.scheduler={scheduler}", f"training.scheduler_args={arguments}"]
    said = refused(capsys, "train", recipe_file, *words)
    assert reason in said
    assert "training.scheduler_args" in said
    assert not (tmp_path / "run").exists()


def test_a_decay_that_is_longer_than_the_run(capsys, recipe_file):
    words = ["training.scheduler=warmup_stable_decay", "training.scheduler_args={num_decay_steps: 9}"]
    said = refused(capsys, "train", recipe_file, "training.max_steps=4", *words)
    assert "do not fit into the 4 steps of this run" in said


def test_a_minimum_rate(train):
    words = [
        "training.scheduler=cosine_with_min_lr",
        "training.scheduler_args={min_lr: 1e-4}",
        "training.warmup_ratio=0",
    ]
    rates = [line["learning_rate"] for line in train("run", *words)]
    assert rates == pytest.approx(
        [1e-3, 1e-3 * (0.1 + 0.9 * 0.853553), 5.5e-4, 1e-3 * (0.1 + 0.9 * 0.146447)], rel=1e-4
    )


def test_warm_up_stable_decay(train):
    words = ["training.scheduler=warmup_stable_decay", "training.warmup_ratio=0.25"]
    args = "training.scheduler_args={num_decay_steps: 2, decay_type: linear, min_lr_ratio: 0.5}"
    assert [line["learning_rate"] for line in train("run", *words, args)] == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4])


def test_deterministic_kernels_take_the_same_steps(train):
    """On a CPU, whose kernels are deterministic anyway; what it finds here is an operation that has none."""
    plain, asked = train("plain"), train("asked", "training.deterministic=true")
    assert [step["loss"] for step in asked] == [step["loss"] for step in plain]


def test_without_clipping_the_norm_is_logged_and_nothing_is_scaled(train):
    free = train("free", "training.max_grad_norm=null")
    huge = train("huge", "training.max_grad_norm=1000000")
    small = train("small", "training.max_grad_norm=0.01")
    assert min(line["grad_norm"] for line in free) > 0.01
    assert [(line["loss"], line["grad_norm"]) for line in free] == [(line["loss"], line["grad_norm"]) for line in huge]
    assert free[-1]["loss"] != small[-1]["loss"]


def test_lion_moves_every_weight_by_the_learning_rate(train, tmp_path):
    from safetensors.torch import load_file

    lines = train(
        "run",
        "training.optimizer=lion",
        "training.scheduler=constant",
        "training.weight_decay=0",
        "training.save_every=1",
    )
    assert all(line["learning_rate"] == 1e-3 for line in lines)
    first, second = (
        load_file(RunFolder(tmp_path / "run").checkpoints / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2)
    )
    moved = torch.cat([(second[name] - first[name]).abs().flatten() for name in first])
    assert set(moved.mul(1e6).round().int().tolist()) <= {0, 1000}
    assert (moved > 0).float().mean() > 0.5


def lion_of_the_paper(weight, gradients, rate, decay, first, second):
    """Algorithm 2 of arXiv 2302.06675, a number at a time, in Python's doubles."""
    weights, momenta = list(weight), [0.0] * len(weight)
    for gradient in gradients:
        for at, value in enumerate(gradient):
            mix = first * momenta[at] + (1 - first) * value
            sign = (mix > 0) - (mix < 0)
            weights[at] -= rate * (sign + decay * weights[at])
            momenta[at] = second * momenta[at] + (1 - second) * value
    return weights


def test_lion_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, generator=generator, dtype=torch.float64)
    gradients = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    gradients[:, 0] = 0  # it has no sign
    weight = torch.nn.Parameter(start.clone())
    optimizer = Lion([weight], lr=0.01, weight_decay=0.3)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    expected = lion_of_the_paper(start.tolist(), gradients.tolist(), 0.01, 0.3, 0.9, 0.99)
    assert weight.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_lion_without_clipping_under_zero_takes_vanillas_steps(train, recipe_file, tmp_path, strategy):
    words = ["training.optimizer=lion", "training.max_grad_norm=null", "training.scheduler=constant"]
    vanilla = train("vanilla", *words)
    how = [f"training.strategy={strategy}", "training.processes=2", "training.batch_size=4", "training.max_steps=4"]
    done = minisft("train", recipe_file, f"output={tmp_path / 'zero'}", *words, *how)
    assert done.returncode == 0, done.stderr
    for one, other in zip(vanilla, lines_of(tmp_path / "zero"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-3)  # a gradient next to zero may turn its sign
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)


def test_lion_keeps_half_of_adams_state(recipe_file):
    from minisft.planning.planner import PlanOptions, plan_for
    from minisft.recipe import load_recipe

    adam = load_recipe(recipe_file)
    lion = replace(adam, training=replace(adam.training, optimizer="lion"))
    [one, other] = [plan_for(recipe, PlanOptions(None, None, 1)) for recipe in (adam, lion)]
    memory = [made.rows[0].memory.optimizer for made in (one, other)]
    assert memory[1] == memory[0] / 2


def test_a_run_without_an_end_is_refused_at_once(capsys, recipe_file):
    """Its checkpoints were once counted one after the other: 4e30 of them."""
    refused(capsys, "train", recipe_file, "training.epochs=1e30")


def test_a_loss_that_is_no_number_names_the_checkpoint_before_it(capsys, recipe_file, tmp_path):
    """A learning rate beyond fp32 spoils the weights in the second step; the first has a checkpoint."""
    words = ["training.learning_rate=1e38", "training.warmup_ratio=0", "training.save_every=1", "training.max_steps=5"]
    status, _, said = run(capsys, "train", recipe_file, *words)
    assert status == 2, said
    last = RunFolder(tmp_path / "run").list_checkpoints()[-1].name
    assert f"the checkpoints written before are complete, the last of them {last}" in said
    assert "that makes another run, which needs --force" in said
