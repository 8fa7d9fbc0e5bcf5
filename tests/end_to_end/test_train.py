"""Training through the command line: one trajectory, checkpoints that load, a mask that reaches the loss."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisft.models import load_model
from minisft.run_folder import RunFolder, load_run
from minisft.training.batching import StepSampler, measure_lengths
from minisft.training.checkpoints import publish_final_model
from minisft.training.run_training import run_steps
from tests.padded import padded_loop
from tests.tiny import minisft, write_recipe

STRATEGIES = [("vanilla", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]


def train(recipe, output, *overrides, resume=False):
    words = ["train", recipe, f"output={output}", "training.save_every=1", *overrides]
    done = minisft(*words, *(["--resume"] if resume else []))
    assert done.returncode == 0, done.stderr
    return RunFolder(output)


def metrics(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def padded_reference(folder, run, steps, learning_rates):
    from datasets import load_from_disk

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [[index for plan in step for index in plan.indexes] for step in steps]
    return padded_loop(model, load_from_disk(str(run.dataset / "train")), rows, learning_rates), model


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory, tiny_model, conversations):
    folder = tmp_path_factory.mktemp("train")
    settings = "{epochs: 2, learning_rate: 1.0e-3, precision: fp32, weight_decay: 0.0, row_tokens: 120}"
    recipe = write_recipe(folder, tiny_model, conversations, settings)
    return recipe, train(recipe, folder / "run")


def test_equals_a_plain_padded_loop(vanilla, tiny_model):
    _, run = vanilla
    from datasets import load_from_disk

    dataset = load_from_disk(str(run.dataset / "train"))
    sampler = StepSampler(measure_lengths(dataset), global_batch=8, row_tokens=120, processes=1, rank=0, seed=0)
    steps = []
    for sampler.epoch in range(2):
        steps += list(sampler)
    logged = metrics(run)
    assert [line["step"] for line in logged] == list(range(1, len(steps) + 1))
    expected, model = padded_reference(tiny_model, run, steps, [line["learning_rate"] for line in logged])
    for line, (loss, norm) in zip(logged, expected, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=2e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-4)
    final = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    for name, weight in final.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), atol=2e-5, rtol=1e-4)


def test_the_log_has_what_the_contract_names(vanilla):
    _, run = vanilla
    for line in metrics(run):
        assert set(line) == {
            "step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "seconds",
            "peak_memory_mb", "communication_mb", "sources",
        }  # fmt: skip
        assert line["tokens"] > line["supervised_tokens"] > 0
        assert line["seconds"] > 0
        assert line["peak_memory_mb"] > 0
    assert list(run.tensorboard.iterdir())
    assert (run.root / "evaluation" / "loss.png").exists()


def test_every_checkpoint_gives_the_loss_of_the_next_step(vanilla):
    """checkpoint-N, in plain transformers, on the batch of step N+1: the loss logged at N+1."""
    _, run = vanilla
    check_checkpoints(run)


def check_checkpoints(run):
    from datasets import load_from_disk

    dataset = load_from_disk(str(run.dataset / "train"))
    sampler = StepSampler(measure_lengths(dataset), global_batch=8, row_tokens=10**9, processes=1, rank=0, seed=0)
    steps = []
    for sampler.epoch in range(2):
        steps += list(sampler)
    logged = {line["step"]: line for line in metrics(run)}
    for number in range(1, len(steps)):
        model = AutoModelForCausalLM.from_pretrained(run.checkpoints / f"checkpoint-{number}", dtype=torch.float32)
        total = count = 0
        for index in steps[number][0].indexes:
            row = dataset[index]
            labels = torch.tensor([row["labels"]])
            supervised = int((labels[:, 1:] != -100).sum())
            total += model(torch.tensor([row["input_ids"]]), labels=labels).loss.item() * supervised
            count += supervised
        assert total / count == pytest.approx(logged[number + 1]["loss"], rel=1e-5)
        assert count == logged[number + 1]["supervised_tokens"]
    last = AutoModelForCausalLM.from_pretrained(run.checkpoints / f"checkpoint-{len(steps)}")
    final = AutoModelForCausalLM.from_pretrained(run.model)
    for name, weight in final.state_dict().items():
        torch.testing.assert_close(weight, last.state_dict()[name], atol=0, rtol=0)


def test_a_checkpoint_is_a_plain_model_folder(vanilla):
    _, run = vanilla
    for folder in (run.model, run.checkpoints / "checkpoint-1"):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
        assert not {name for name in names if name.endswith(".bin")}, "no pickled arguments"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "tea"}], tokenize=False)
        assert "[INST] tea [/INST]" in text
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.config.use_cache
        assert str(run.root) not in (folder / "config.json").read_text()


def test_only_the_newest_checkpoint_keeps_its_optimizer_state(vanilla):
    _, run = vanilla
    assert [path.parent.name for path in run.checkpoints.glob("*/optimizer.pt")] == [f"checkpoint-{len(metrics(run))}"]


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [
        ("vanilla", 2),
        ("zero2", 2),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [("zero1", 2), ("zero3", 2), ("zero2", 1)]),
    ],
)
def test_one_trajectory_and_complete_checkpoints(vanilla, tmp_path, strategy, processes):
    recipe, alone = vanilla
    run = train(
        recipe, tmp_path / "run", f"training.strategy={strategy}", f"training.processes={processes}",
        f"training.batch_size={8 // processes}",
    )  # fmt: skip
    for ours, reference in zip(metrics(run), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2e-4)
        assert ours["supervised_tokens"] == reference["supervised_tokens"]
    check_checkpoints(run)
    ours = load_model(run.model, dtype=torch.float32).state_dict()
    for name, weight in load_model(alone.model, dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "offload"), [("zero2", "optimizer"), ("zero3", "parameters")])
def test_offload_takes_the_same_steps(vanilla, tmp_path, strategy, offload):
    recipe, alone = vanilla
    run = train(
        recipe, tmp_path / "run", f"training.strategy={strategy}", "training.processes=2", "training.batch_size=4",
        f"training.offload={offload}",
    )  # fmt: skip
    for ours, reference in zip(metrics(run), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2e-4)
    check_checkpoints(run)


def test_accumulation_changes_nothing(vanilla, tmp_path):
    recipe, alone = vanilla
    run = train(recipe, tmp_path / "run", "training.batch_size=2", "training.gradient_accumulation=4")
    for ours, reference in zip(metrics(run), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2e-4)


def test_packing_follows_one_trajectory(vanilla, tmp_path):
    """Two packs a step, however they are dealt; the dataset's 30 conversations need fewer steps than without."""
    recipe, alone = vanilla
    how = ["training.packing=true", "data.max_length=256"]
    whole = train(recipe, tmp_path / "whole", *how, "training.batch_size=2")
    split = train(recipe, tmp_path / "split", *how, "training.batch_size=1", "training.processes=2")
    assert sum(line["tokens"] for line in metrics(whole)) == sum(line["tokens"] for line in metrics(alone))
    assert max(line["tokens"] for line in metrics(whole)) <= 2 * 256
    for ours, reference in zip(metrics(split), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2e-4)


@pytest.mark.parametrize(
    "strategy", ["vanilla", *(pytest.param(name, marks=pytest.mark.long) for name in ("zero2", "zero3"))]
)
def test_a_killed_run_resumes_to_the_same_bits(vanilla, tmp_path, strategy):
    """SIGKILL of the launcher once a checkpoint is whole; its workers die with it, and nothing is lost."""
    recipe, _ = vanilla
    processes = 1 if strategy == "vanilla" else 2
    how = [
        f"training.strategy={strategy}", f"training.processes={processes}", f"training.batch_size={8 // processes}",
        "training.epochs=6", "training.save_every=5",
    ]  # fmt: skip
    whole = train(recipe, tmp_path / "whole", *how)
    output = tmp_path / "run"
    kill_when(output / "checkpoints" / "checkpoint-5", ["train", recipe, f"output={output}", *how])
    killed_at = max(line["step"] for line in metrics(RunFolder(output)))
    assert killed_at < len(metrics(whole))
    refused = minisft("train", recipe, f"output={output}", *how)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    run = train(recipe, output, *how, resume=True)
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(whole)]
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(whole)]
    ours = load_model(run.model, dtype=torch.float32).state_dict()
    for name, weight in load_model(whole.model, dtype=torch.float32).state_dict().items():
        assert torch.equal(ours[name], weight), name


def test_killed_before_the_first_checkpoint(vanilla, tmp_path):
    """Then --resume starts over, and each step is logged once."""
    recipe, alone = vanilla
    output = tmp_path / "run"
    kill_when(output / "metrics.jsonl", ["train", recipe, f"output={output}", "training.save_every=100"])
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # torn
    run = train(recipe, output, "training.save_every=100", resume=True)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(alone)]


def test_killed_between_the_last_checkpoint_and_the_model(vanilla, tmp_path):
    recipe, alone = vanilla
    run = RunFolder(tmp_path / "run")
    shutil.copytree(alone.root, run.root)
    shutil.rmtree(run.model)
    train(recipe, run.root, resume=True)
    assert metrics(run) == metrics(alone)
    assert (run.model / "model.safetensors").read_bytes() == (alone.model / "model.safetensors").read_bytes()


def test_a_state_that_a_strategy_cannot_take_over_is_refused(vanilla, tmp_path):
    recipe, alone = vanilla
    words = ["train", recipe, f"output={tmp_path / 'run'}", "training.optimizer=sgd"]
    shutil.copytree(alone.root, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    kept = tmp_path / "run" / "recipe.yaml"
    kept.write_text(kept.read_text().replace("optimizer: adamw", "optimizer: sgd"))
    refused = minisft(*words, "training.strategy=zero2", "training.processes=2", "training.batch_size=4", "--resume")
    assert refused.returncode == 2
    assert "only AdamW's state is converted" in refused.stderr
    assert "training.strategy=vanilla training.processes=1" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_saved_models_equal_the_live_one(vanilla, tmp_path):
    """On a fixed batch: what is in memory after the last step, the last checkpoint, and `model/`."""
    _, alone = vanilla
    settings = replace(load_run(alone.root), output=str(tmp_path / "run"))
    run = RunFolder(tmp_path / "run")
    shutil.copytree(alone.dataset, run.dataset)
    live: Any = run_steps(settings, run, None).model
    live.eval()
    publish_final_model(run)
    ids = torch.arange(4, 64)[None]
    positions = torch.arange(60)[None]
    with torch.no_grad():
        expected = live(ids, position_ids=positions, conversation_lengths=(60,)).logits
        for folder in (run.list_checkpoints()[-1], run.model):
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
            for name, weight in live.named_parameters():
                assert torch.equal(loaded.get_parameter(name), weight), name


def test_a_loss_that_is_no_number_stops_before_it_spoils_anything(vanilla, tmp_path, tiny_model):
    """The embedding of one token is NaN: the step that first meets it is named with its rows."""
    recipe, _ = vanilla
    spoiled = tmp_path / "spoiled"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[AutoTokenizer.from_pretrained(tiny_model).encode("3")[0]] = torch.nan
    model.save_pretrained(spoiled)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(spoiled)
    done = minisft("train", recipe, f"output={tmp_path / 'run'}", f"model={spoiled}", "training.save_every=1")
    assert done.returncode == 2
    assert "step 1: the loss is nan; rows of the step: " in done.stderr
    assert "no checkpoint was written yet" in done.stderr
    assert "are complete" not in done.stderr
    assert "talk-" in done.stderr
    assert not RunFolder(tmp_path / "run").list_checkpoints()


def kill_when(path, words):
    command = [sys.executable, "-m", "minisft", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not path.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
