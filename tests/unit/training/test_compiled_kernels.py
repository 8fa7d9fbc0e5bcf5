"""Norms, rotary embeddings and activations that torch compiles, on the CPU, against the model's own code."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minisft.recipe import TrainingRecipe
from minisft.run_folder import RunFolder
from minisft.training import attention
from minisft.training.batching import pack_sequences
from minisft.training.kernels import use_kernels
from minisft.training.loss import row_loss
from tests.command import run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here"),
]


def test_a_compiled_model_computes_the_same(tmp_path):
    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)
    compiled = copy.deepcopy(plain)
    choice = use_kernels(compiled, TrainingRecipe(kernels="compile", precision="fp32"), torch.device("cpu"))
    assert choice.replaced == ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb")
    assert choice.difference is not None
    assert choice.difference < 1e-5
    torch._dynamo.utils.counters.clear()
    for lengths in ((5, 9), (31,), (2, 3, 40)):
        row = pack_sequences([(np.arange(length), np.arange(length)) for length in lengths])
        losses = [row_loss(model, row) for model in (plain, compiled)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for name, one in compiled.named_parameters():
        torch.testing.assert_close(one.grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0


@pytest.mark.parametrize("key", ["lora={rank: 2}", "gradient_checkpointing=true", "packing=true", "strategy=zero2"])
def test_training_takes_the_same_steps(capsys, recipe_file, tmp_path, key):
    words = ("train", recipe_file, f"training.{key}", "training.max_steps=3")
    losses = []
    for kernels in ("none", "compile"):
        status, _, said = run(capsys, *words, f"output={tmp_path / kernels}", f"training.kernels={kernels}")
        assert status == 0, said
        folder = RunFolder(tmp_path / kernels)
        assert json.loads(folder.environment.read_text())["kernels"]["chosen"] == kernels
        losses.append([json.loads(line)["loss"] for line in folder.metrics.read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
