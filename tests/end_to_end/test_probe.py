"""Models that are wrong in a packed row, or in every row: `train` finds out before the first step."""

import json

import pytest

from tests.command import refused, run
from tests.tiny import write_recipe, write_tiny_model

HEAD = """
import torch
from copy import copy
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
class OwnConfig({base}Config):
    model_type = "{type}"
"""
# A part of every earlier token of the row is added to the later ones.
LEAK = """
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, input_ids=None, **options):
        states = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=states + 0.2 * states.cumsum(1), **options)
"""
# The mean of all tokens of the row, the later ones too, is added to each of them.
NO_MASK = LEAK.replace("states.cumsum(1)", "states.mean(1, keepdim=True)")
# The window is in the mask that transformers builds, and not in the arguments of the attention.
NO_WINDOW = """
class WithoutWindow:
    def __init__(self, config):
        self.__dict__["config"] = config
    def __getattr__(self, name):
        return None if name == "sliding_window" else getattr(self.config, name)
class OwnModel(MistralForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.config = WithoutWindow(self.config)
"""


@pytest.fixture
def recipe_of(tmp_path, conversations, monkeypatch, request):
    """Return a function that writes a recipe whose model has a class of its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def write(code, base="Llama", **options):
        folder = write_tiny_model(tmp_path / "model")
        kind = "own_" + str(abs(hash(request.node.name)))
        (folder / "own.py").write_text(HEAD.format(base=base, type=kind) + code)
        config = json.loads((folder / "config.json").read_text()) | options
        config |= {"model_type": kind, "architectures": ["OwnModel"]}
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        (folder / "config.json").write_text(json.dumps(config))
        training = "{max_steps: 4, learning_rate: 1.0e-3, precision: fp32, eval_every: 2}"
        return write_recipe(tmp_path, folder, conversations, training)

    return write


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line.get("eval_loss")) for line in found]


def test_a_model_that_leaks_across_a_row_trains_with_one_conversation_in_a_row(recipe_of, tmp_path, capsys):
    recipe = recipe_of(LEAK)
    found, expected = tmp_path / "found", tmp_path / "expected"
    status, out, err = run(capsys, "train", recipe, "--trust-remote-code", f"output={found}")
    assert status == 0, err
    assert "OwnModel computes a conversation differently after another one in the same row" in out
    assert "forwards an epoch in place of" in out
    assert run(capsys, "train", recipe, "--trust-remote-code", f"output={expected}", "training.row_tokens=1")[0] == 0
    assert lines(found) == lines(expected)
    probe = json.loads((found / "environment.json").read_text())["probe"]
    assert probe["verdict"] == "alone"
    assert probe["isolation"] > probe["tolerance"] > max(probe["causality"], probe["exactness"])


def test_a_model_without_a_causal_mask_is_refused(recipe_of, capsys):
    err = refused(capsys, "train", recipe_of(NO_MASK), "--trust-remote-code")
    assert "the model OwnModel: a token changes the predictions of tokens before it" in err


def test_a_model_whose_window_is_ignored_trains_with_the_attention_of_transformers(recipe_of, tmp_path, capsys):
    recipe = recipe_of(NO_WINDOW, base="Mistral", sliding_window=32)
    status, out, err = run(capsys, "train", recipe, "--trust-remote-code")
    assert status == 0, err
    assert "OwnModel is wrong with MiniSFT's attention: a conversation longer than the model's window has other" in out
    assert "each conversation has its own row" in out
    probe = json.loads((tmp_path / "run" / "environment.json").read_text())["probe"]
    assert (probe["verdict"], probe["attention"], probe["isolation"]) == ("alone", "sdpa", None)


def test_a_right_model_is_recorded_as_such(recipe_file, tmp_path, capsys):
    assert run(capsys, "train", recipe_file, "training.max_steps=1")[0] == 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["probe"]["verdict"] == "right"


@pytest.mark.parametrize("words", [(), ("training.processes=2", "training.batch_size=4")], ids=["one", "two"])
def test_a_right_model_is_right_in_half_precision_too(recipe_file, tmp_path, capfd, words):
    status, _, err = run(capfd, "train", recipe_file, "training.max_steps=1", "training.precision=bf16", *words)
    assert status == 0, err
    found = json.loads((tmp_path / "run" / "environment.json").read_text())["probe"]
    assert found["verdict"] == "right"
    assert found["exactness"] > 0  # half precision was seen


def test_a_small_leak_is_found_in_half_precision(recipe_of, tmp_path, capsys):
    recipe = recipe_of(LEAK.replace("0.2", "0.01"))
    assert run(capsys, "train", recipe, "--trust-remote-code", "training.precision=bf16")[0] == 0
    found = json.loads((tmp_path / "run" / "environment.json").read_text())["probe"]
    assert found["verdict"] == "alone"
    assert found["isolation"] < 0.3
