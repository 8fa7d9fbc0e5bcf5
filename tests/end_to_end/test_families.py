"""Model families: whatever the probe decides about a model, eight steps are those of a plain padded loop."""

import json
import os
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minisft.run_folder import RunFolder
from minisft.training.batching import measure_lengths, steps_of_epoch
from tests.command import run as run_command
from tests.padded import padded_loop
from tests.tiny import SINCE_TRANSFORMERS_5_20, byte_tokenizer, minisft, write_recipe

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
OLD = {"n_embd": 32, "n_head": 4, "n_layer": 2}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "right"),
    "qwen3": (HEADS, "right"),
    "gemma2": (HEADS | WINDOW | {"attn_logit_softcapping": 5.0}, "right"),
    "gemma3_text": (HEADS | WINDOW, "right"),
    "gpt_oss": (HEADS | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}, "right"),
    "qwen3_5_text": (HEADS | LINEAR, "alone"),
    "qwen3_next": (HEADS | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}, "alone"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "alone"),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1}, "alone"),
    "falcon_h1": (HEADS | MAMBA, "alone"),
    "bloom": (OLD, "alone"),
    "gptj": (OLD | {"rotary_dim": 4}, "alone"),
    "gpt_neo": ({"num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16}, "alone"),
    "falcon": ({"alibi": True}, "alone"),
    "stablelm": ({}, "alone"),
    "llama4_text": (
        HEADS | {"attention_chunk_size": 32, "num_local_experts": 2, "intermediate_size_mlp": 64}, "alone",
    ),
}  # fmt: skip
FAST = ("gemma2", "gpt_oss", "bloom", "gpt_neo", "falcon")


def write_family(folder, kind):
    """A tiny model with weights that are large enough for a leak, a soft cap or a window to show in its loss."""
    tokenizer = byte_tokenizer()
    options = SIZES | FAMILIES[kind][0] | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEN = (
    "llama", "qwen3", "qwen3_5_text", "qwen3_next", "lfm2", "gemma2", "gemma3_text", "gpt_oss", "mamba2", "falcon_h1",
)  # fmt: skip
LONG, RARE = pytest.mark.long, pytest.mark.skipif(not os.environ.get("MINISFT_EVERY_CASE"), reason="takes long")
CASES = [
    *(pytest.param(kind, 1, "vanilla", marks=() if kind in FAST else LONG) for kind in FAMILIES),
    *(pytest.param(kind, 2, strategy, marks=LONG) for kind in TEN for strategy in ("vanilla", "zero2")),
    *(pytest.param(kind, 2, "zero3", marks=LONG) for kind in ("bloom", "qwen3_5_text")),
    *(pytest.param(kind, 1, "zero2", marks=(LONG, RARE)) for kind in TEN),
]


@pytest.mark.parametrize(("kind", "processes", "strategy"), CASES)
def test_a_family_takes_the_steps_of_the_padded_loop(tmp_path, conversations, capfd, kind, processes, strategy):
    model = write_family(tmp_path / "model", kind)
    settings = (
        f"{{learning_rate: 1.0e-3, precision: fp32, weight_decay: 0.0, max_steps: 8, row_tokens: 400, "
        f"strategy: {strategy}, processes: {processes}, batch_size: {8 // processes}, eval_every: 4}}"
    )
    recipe = write_recipe(tmp_path, model, conversations, settings)
    if processes == 1 and strategy == "vanilla":
        assert run_command(capfd, "train", recipe).status == 0
    else:
        done = minisft("train", recipe)
        assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "run")
    probe = json.loads((run.root / "environment.json").read_text())["probe"]
    at_once = FAMILIES[kind][1] == "right" and (SINCE_TRANSFORMERS_5_20 or kind != "gemma2")
    assert probe["verdict"] == ("right" if at_once else "alone")

    from datasets import load_from_disk

    rows = load_from_disk(str(run.dataset / "train"))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    sizes, steps = measure_lengths(rows).tokens, []
    for epoch in range(3):
        steps += [
            step.tolist() for step in steps_of_epoch(sizes, global_batch=8, pack_tokens=None, seed=0, epoch=epoch)
        ]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = padded_loop(reference, rows, steps[:8], [line["learning_rate"] for line in lines])
    found = [(line["loss"], line["grad_norm"]) for line in lines]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
