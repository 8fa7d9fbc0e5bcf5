"""The held-out loss during training: the evaluation's, with no effect on the steps, and what ends a run early."""

import json
from dataclasses import replace

import pytest
import torch

from minisft.data.preparation import prepare
from minisft.data.prepared import load_test
from minisft.evaluation.metrics import loss_batches, mean_loss, sum_of_losses
from minisft.models import load_model
from minisft.recipe import load_recipe
from minisft.run_folder import RunFolder, write_resolved_recipe
from minisft.training.checkpoints import is_last
from minisft.training.held_out import EarlyStopping
from minisft.training.run_training import train_in_this_process
from tests.tiny import minisft, write_recipe

SETTINGS = "{epochs: 3, learning_rate: 1.0e-3, precision: fp32, eval_every: epoch, row_tokens: 200}"
STOPPING = ["training.epochs=9", "training.learning_rate=1.0e-2", "training.early_stopping=2"]


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """Held-out conversations in letters that training never shows: the better it learns, the worse they are told."""
    path = tmp_path_factory.mktemp("unlike") / "talks.jsonl"
    turns = [{"from": "human", "value": "tea"}, {"from": "gpt", "value": "QXZJKQXZJK" * 3}]
    path.write_text("".join(json.dumps({"id": f"odd-{number}", "conversations": turns}) + "\n" for number in range(3)))
    return [*STOPPING, f"data.test={path}"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, conversations):
    return write_recipe(tmp_path_factory.mktemp("held-out"), tiny_model, conversations, SETTINGS)


def train(recipe, output, *overrides, resume_from=None):
    """Train in this process: nothing here depends on the launch."""
    settings = replace(load_recipe(recipe, overrides), output=str(output))
    run = RunFolder(output)
    prepare(settings)
    write_resolved_recipe(run, settings)
    train_in_this_process(settings, run, resume_from)
    return run


def metrics(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def held_out(run):
    return {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}


def weights(run):
    return (run.model / "model.safetensors").read_bytes()


def loss_of(checkpoint, run):
    """As `minisft evaluate` computes it."""
    rows = [(row["input_ids"], row["labels"]) for row in load_test(run.root)]
    model = load_model(checkpoint, dtype=torch.float32)
    return mean_loss(sum_of_losses(model, batch) for batch in loss_batches(rows))[0]


def test_it_is_the_evaluations_loss_and_changes_no_step(recipe, tmp_path):
    run = train(recipe, tmp_path / "run")
    assert list(held_out(run)) == [4, 8, 12]
    for step, loss in held_out(run).items():
        assert loss == pytest.approx(loss_of(run.checkpoints / f"checkpoint-{step}", run), rel=1e-5)
    without = train(recipe, tmp_path / "without", "training.eval_every=null", "training.log_every=100")
    assert weights(run) == weights(without)
    assert [line["step"] for line in metrics(without)] == [1], "the first is always logged"
    often = train(recipe, tmp_path / "often", "training.eval_every=5", "training.log_every=100")
    assert [line["step"] for line in metrics(often)] == [1, 5, 10, 12], "a step with a held-out loss is logged"
    assert held_out(often)[12] == held_out(run)[12]


def test_a_run_ends_early_and_resumes_to_the_same_end(recipe, stopping, tmp_path):
    run = train(recipe, tmp_path / "run", *stopping, "training.keep_optimizer=all")
    losses = list(held_out(run).values())
    last = run.list_checkpoints()[-1]
    assert losses == sorted(losses), "else the test shows nothing"
    assert list(held_out(run)) == [5, 10, 15]  # of 45: the first was the lowest
    assert last.name == "checkpoint-15"
    assert run.is_trained()
    assert is_last(last, EarlyStopping(2))
    again = train(recipe, run.root, *stopping, resume_from=run.list_checkpoints()[-2])
    assert list(held_out(again).values()) == losses
    assert run.list_checkpoints()[-1] == last


def test_between_the_steps_of_checkpoints_too(recipe, stopping, tmp_path):
    """It ends at step 2N or so, where no checkpoint was due: the last step is one all the same."""
    run = train(recipe, tmp_path / "run", *stopping, "training.eval_every=3", "training.save_every=100")
    assert [path.name for path in run.list_checkpoints()] == [f"checkpoint-{max(held_out(run))}"]
    assert list(held_out(run)) == [3, 6, 9]


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "lora"), [
    ("vanilla", "null"), ("zero1", "null"), ("zero2", "null"), ("zero3", "null"), ("zero3", "{rank: 4}"),
])  # fmt: skip
def test_two_processes_agree(recipe, stopping, tmp_path, strategy, lora):
    stopping = [*stopping, f"training.lora={lora}"]
    alone = train(recipe, tmp_path / "alone", *stopping)
    run = RunFolder(tmp_path / "run")
    how = ["training.processes=2", "training.batch_size=4", f"training.strategy={strategy}"]
    done = minisft("train", recipe, f"output={run.root}", *stopping, *how)
    assert done.returncode == 0, done.stderr
    assert "stopped early at step" in done.stdout
    assert list(held_out(run)) == list(held_out(alone))
    assert list(held_out(run).values()) == pytest.approx(list(held_out(alone).values()), rel=2e-4)
    last = run.list_checkpoints()[-1]
    assert held_out(run)[max(held_out(run))] == pytest.approx(loss_of(last, run), rel=1e-5)
