"""LoRA through the command line: one trajectory, folders that plain peft loads, and what cannot be done."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisft.models import load_model
from minisft.run_folder import RunFolder
from tests.tiny import minisft, write_recipe


def train(recipe, output, *overrides):
    done = minisft("train", recipe, f"output={output}", *overrides)
    assert done.returncode == 0, done.stderr
    return RunFolder(output)


def losses(run):
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory, tiny_model, conversations):
    folder = tmp_path_factory.mktemp("lora")
    settings = "{epochs: 2, learning_rate: 1.0e-2, precision: fp32, lora: {rank: 4}}"
    recipe = write_recipe(folder, tiny_model, conversations, settings)
    return recipe, train(recipe, folder / "run")


def logits(model):
    return model.eval()(input_ids=torch.arange(20)[None]).logits


def test_only_adapters_are_saved_and_learned(vanilla, tiny_model):
    _, run = vanilla
    assert losses(run)[-1] < losses(run)[0]
    for folder in (*run.list_checkpoints(), run.model):
        assert (folder / "adapter_model.safetensors").exists()
        assert not (folder / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert not torch.allclose(logits(load_model(run.model, dtype=torch.float32)), logits(base), atol=1e-3)


def test_plain_peft_and_plain_transformers_load_them_elsewhere(vanilla, tiny_model, tmp_path):
    from peft import PeftModel

    _, run = vanilla
    folder = tmp_path / "elsewhere"
    shutil.copytree(run.model, folder)
    ours = logits(load_model(run.model, dtype=torch.float32))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(folder))), ours)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)), ours)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["vanilla", "zero1", "zero2", "zero3"])
def test_one_trajectory(vanilla, tmp_path, strategy):
    recipe, alone = vanilla
    split = (f"training.strategy={strategy}", "training.processes=2", "training.batch_size=4")
    run = train(recipe, tmp_path / "run", *split)
    assert losses(run) == pytest.approx(losses(alone), rel=2e-5)
    ours, theirs = (logits(load_model(folder.model, dtype=torch.float32)) for folder in (run, alone))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_checkpoints_are_scored_beside_the_base_model(vanilla):
    _, run = vanilla
    done = minisft("evaluate", run.root, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [entry["step"] for entry in results["checkpoints"]] == [4, 8]
    assert results["checkpoints"][-1]["loss"] < results["base"]["loss"]


def test_export_merges_the_adapters(vanilla, tmp_path):
    _, run = vanilla
    folder = tmp_path / "merged"
    done = minisft("export", run.root, folder)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("adapter_*"))
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = logits(load_model(run.model, dtype=torch.float32))
    assert torch.allclose(logits(merged), ours, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert merged.generation_config.eos_token_id == AutoTokenizer.from_pretrained(folder).eos_token_id
    again = minisft("export", run.root, folder)
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    assert minisft("export", run.root, folder, "--force", "--checkpoint", "checkpoint-4").returncode == 0
    early = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(early), logits(load_model(run.list_checkpoints()[0], dtype=torch.float32)), atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no folder to write is named"),
        (("out", "--checkpoint", "checkpoint-3"), "has no checkpoint of that name"),
        (("out", "--checkpoint", "best"), "not scored yet"),
        (("{run}/model/inside",), "this folder belongs to the run itself"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, fresh_run, words, said):
    words = [word.replace("{run}", str(fresh_run)).replace("out", str(tmp_path / "out")) for word in words]
    done = minisft("export", fresh_run, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def fresh_run(vanilla, tmp_path_factory):
    """The run without its evaluation."""
    folder = tmp_path_factory.mktemp("fresh") / "run"
    shutil.copytree(vanilla[1].root, folder, ignore=shutil.ignore_patterns("evaluation"))
    return folder


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lora={rank: 4, target_modules: [nowhere]}", "training.lora.target_modules"),
        ("training.lora={rank: 0}", "training.lora.rank"),
        ("training.lora={rank: 4, load_in_4bit: true}", "weights of 4 bits need a GPU"),
    ],
)
def test_what_cannot_be_done_is_named(vanilla, tmp_path, override, said):
    recipe, _ = vanilla
    done = minisft("train", recipe, f"output={tmp_path / 'run'}", override)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
