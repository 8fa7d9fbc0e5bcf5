"""The table of models: configurations are small, a wrong step is found, and the page keeps its other text."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Dense, mixtures of experts, windows, sinks, ALiBi, recurrent, convolution and linear-attention layers.
FAMILIES = (
    "llama", "qwen3", "qwen3_5_text", "qwen3_next", "lfm2", "gemma2", "gemma3_text", "gpt_oss", "mamba2", "falcon_h1",
    "bloom", "gpt2", "gpt_neo", "gptj", "falcon", "mpt", "opt", "llama4_text", "phimoe", "stablelm", "deepseek_v3",
    "mixtral", "granitemoehybrid", "nemotron_h", "cohere2",
)  # fmt: skip


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("models")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next", "bloom"])
def test_a_configuration_is_small_and_keeps_every_kind_of_layer(models, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    config, default = models.shrink(kind), AutoConfig.for_model(kind)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 200_000
    assert set(getattr(config, "layer_types", None) or ()) == set(getattr(default, "layer_types", None) or ())
    assert all(value == 0 for name, value in config.to_dict().items() if "dropout" in name)


@pytest.mark.parametrize(("kind", "other"), [("lfm2", "conv"), ("granitemoehybrid", "linear_attention")])
def test_hybrid_families_keep_layers_that_their_default_configuration_lacks(models, kind, other):
    assert other in models.shrink(kind).layer_types


def test_a_step_is_compared_in_loss_norm_and_every_gradient(models):
    expected = models.Step(2.0, 1.0, {"a": torch.ones(2), "b": torch.full((2,), 0.1)})
    assert models.difference(expected, expected) == ""
    assert "loss" in models.difference(models.Step(2.001, 1.0, expected.gradients), expected)
    assert "gradient norm" in models.difference(models.Step(2.0, 1.001, expected.gradients), expected)
    assert "loss" in models.difference(models.Step(float("nan"), 1.0, expected.gradients), expected)
    changed = expected.gradients | {"b": torch.tensor([0.1, 0.11])}
    assert "gradient of b" in models.difference(models.Step(2.0, 1.0, changed), expected)
    missing = {"a": torch.ones(2)}
    assert "gradient of b" in models.difference(models.Step(2.0, 1.0, missing), expected)


def test_the_table_is_sorted_and_counts_what_can_be_built(models):
    rows = [
        models.Row("opt", "OPTForCausalLM", "right alone", "sdpa"),
        models.Row("bloom", "BloomForCausalLM", "cannot be built", "ValueError: no"),
        models.Row("llama", "LlamaForCausalLM", "right", "sdpa", lora="WRONG: loss 1, and 2 by transformers"),
    ]
    table = models.render_table(rows, "the command")
    assert [line.split(" ")[1] for line in table.splitlines() if line.startswith("| ")][1:] == ["bloom", "llama", "opt"]
    assert "Made by `the command`" in table
    assert "Of the 2 that can be built, 2 train (100%)" in table
    assert [row.failed for row in rows] == [False, False, True]


def test_only_the_text_between_the_markers_is_replaced(models):
    page = f"before\n{models.BEGIN}\nold\n{models.END}\nafter\n"
    written = models.replace_table(page, "new")
    assert written == f"before\n{models.BEGIN}\n\nnew\n\n{models.END}\nafter\n"
    assert models.replace_table(written, "new") == written
    with pytest.raises(ValueError, match="must hold"):
        models.replace_table("no markers", "new")


def test_columns_that_were_not_run_stay_as_the_page_has_them(models):
    before = models.Row("opt", "OPTForCausalLM", "right", "sdpa", "yes", "yes", "one by one", "WRONG: loss", "yes")
    page = f"text\n{models.BEGIN}\n\n{models.render_table([before], 'old')}\n\n{models.END}\n"
    others = ["lora", "checkpointing", "packing", "zero3"]
    now = models.Row("opt", "OPTForCausalLM", "right", "sdpa", bf16="yes")
    [kept] = models.keep_columns([now], page, others)
    assert kept == models.Row("opt", "OPTForCausalLM", "right", "sdpa", "yes", "yes", "one by one", "yes", "yes")
    assert "lora, checkpointing, packing, zero3 were run by an earlier command" in models.render_table(
        [kept], "x", others
    )
    refused = models.Row("opt", "OPTForCausalLM", "refused", "why")
    assert models.keep_columns([refused], page, others) == [refused]


def test_judged_rows_are_read_from_their_file(models, tmp_path):
    assert models.read_rows(None) == models.read_rows(tmp_path / "none") == []
    row = models.Row("opt", "OPTForCausalLM", "right", "sdpa", bf16="yes")
    (tmp_path / "rows.jsonl").write_text(models.json.dumps(models.asdict(row)) + "\n")
    assert models.read_rows(tmp_path / "rows.jsonl") == [row]


@pytest.mark.long
def test_no_family_is_wrong_or_ends_in_a_traceback():
    words = [sys.executable, "benchmarks/models.py", "--only", *FAMILIES]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(FAMILIES)
    assert all("| right" in row for row in rows), done.stdout
