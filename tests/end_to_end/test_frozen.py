"""A model with parameters that the loss does not reach trains on several processes as on one."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisft.run_folder import RunFolder
from tests.tiny import byte_tokenizer, minisft, write_recipe, write_tiny_model

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "llama_with_tower"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.tower = torch.nn.Linear(8, 8)
        self.post_init()
"""
UNUSED = ["tower.weight", "tower.bias"]
TWO = ("training.processes=2", "training.batch_size=4")


@pytest.fixture
def recipe(tmp_path, conversations, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_tiny_model(tmp_path / "model")
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama_with_tower", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights |= {"tower.weight": torch.ones(8, 8), "tower.bias": torch.ones(8)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    training = "{max_steps: 4, learning_rate: 1.0e-3, precision: fp32, scheduler: constant, warmup_ratio: 0.0}"
    return write_recipe(tmp_path, folder, conversations, training)


def train(recipe, output, *words):
    done = minisft("train", recipe, "--trust-remote-code", f"output={output}", *words)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in RunFolder(output).metrics.read_text().splitlines()]
    return losses, json.loads((output / "environment.json").read_text())["probe"]["frozen"], done.stdout


def test_two_processes_take_the_steps_of_one(recipe, tmp_path):
    expected, frozen, printed = train(recipe, tmp_path / "one")
    assert frozen == UNUSED
    assert "the loss does not reach these parameters, so they are frozen: tower.weight, tower.bias" in printed
    losses, frozen, _ = train(recipe, tmp_path / "two", *TWO)
    assert losses == pytest.approx(expected, rel=2e-5)
    assert frozen == UNUSED
    saved = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert all((saved[name] == 1).all() for name in UNUSED)


def test_a_resumed_run_freezes_the_same_parameters(recipe, tmp_path):
    losses, _, _ = train(recipe, tmp_path / "full")
    train(recipe, tmp_path / "resumed", "training.max_steps=2")
    again, frozen, _ = train(recipe, tmp_path / "resumed", "--resume")
    assert (again, frozen) == (losses, UNUSED)
    weights, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("resumed", "full"))
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_takes_the_same_steps(recipe, tmp_path, strategy):
    expected, _, _ = train(recipe, tmp_path / "one")
    losses, frozen, _ = train(recipe, tmp_path / "zero", f"training.strategy={strategy}", *TWO)
    assert losses == pytest.approx(expected, rel=2e-5)
    assert frozen == ([] if strategy == "zero3" else UNUSED)


@pytest.mark.long
def test_a_gemma_3_checkpoint_with_a_vision_tower_trains_on_text(tmp_path, conversations):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer, folder = byte_tokenizer(), tmp_path / "gemma"
    text = {
        "vocab_size": len(tokenizer) + 2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    options: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "image_token_id": len(tokenizer),
    }
    config = Gemma3Config(**options)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    training = "{max_steps: 4, learning_rate: 1.0e-3, precision: fp32}"
    recipe = write_recipe(tmp_path, folder, conversations, training)
    expected, frozen, _ = train(recipe, tmp_path / "one")
    losses, _, _ = train(recipe, tmp_path / "two", *TWO)
    assert losses == pytest.approx(expected, rel=2e-5)
    assert frozen
    assert all(name.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for name in frozen)
