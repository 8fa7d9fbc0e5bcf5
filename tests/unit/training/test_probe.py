"""The probe finds models that are wrong for packed rows, for every row, or beyond a window; and names no right one."""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minisft.errors import UserError
from minisft.training import attention
from minisft.training.probe import probe_model, refuse_wrong_model

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip


def make(kind, **options):
    """Return a tiny random model; its weights are large enough for a leak to show."""
    attention.register()
    config = AutoConfig.for_model(kind, **SMALL | options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    return model


def probe(model, **options):
    options = {"half": False, "max_length": 256} | options
    return probe_model(model, torch.device("cpu"), contextlib.nullcontext, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 16}),
        ("mistral", {"sliding_window": 16}),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
        ("gpt_neox", {}),
    ],
)
def test_models_of_attention_alone_are_right(kind, options):
    result = probe(make(kind, **options))
    assert result.verdict == "right"
    assert (result.window is not None) == ("sliding_window" in options)
    refuse_wrong_model(kind, result)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mamba", {}),
        ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("qwen3_next", {"head_dim": 8, **EXPERTS, **LINEAR}),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_state": 8}),
    ],
)
def test_models_that_run_across_the_row_are_right_with_one_conversation_in_a_row(kind, options):
    result = probe(make(kind, **options))
    assert result.verdict == "alone"
    assert result.isolation > 0.1
    refuse_wrong_model(kind, result)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "a token changes the predictions of tokens before it"),
        ("codegen", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, "a token changes the predictions"),
        ("phimoe", {"sliding_window": 64, "num_local_experts": 4}, "longer than the model's window"),
        (
            "llama4_text",
            {"attention_chunk_size": 64, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
            "longer than the model's window",
        ),
    ],
)
def test_models_without_a_causal_mask_or_a_window_are_refused(kind, options, words):
    result = probe(make(kind, **options))
    assert result.verdict == "refused"
    with pytest.raises(UserError, match=words):
        refuse_wrong_model(kind, result)


def test_a_window_that_no_conversation_reaches_needs_no_proof():
    model = make("phimoe", sliding_window=64, num_local_experts=4)
    result = probe(model, max_length=64)
    assert (result.verdict, result.window) == ("right", None)


def test_the_probe_changes_neither_weights_nor_gradients_nor_random_states_nor_the_mode():
    model = make("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        probe(model)
        assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config._attn_implementation == attention.PADDING_FREE


def test_a_model_that_cannot_be_called_is_refused_with_its_own_error():
    model = make("llama")
    model.forward = lambda **arguments: (_ for _ in ()).throw(AttributeError("no such thing"))
    with pytest.raises(UserError, match="cannot be called as training calls a model .AttributeError: no such thing"):
        probe(model)


def test_logits_that_are_not_finite_are_left_to_the_loss_of_the_first_step():
    model = make("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert probe(model) is None


def test_in_half_precision_a_right_model_is_right_and_a_leak_is_found():
    arithmetic = {"arithmetic": lambda: torch.autocast("cpu", torch.bfloat16)}
    for kind, options, verdict in (
        ("llama", {}, "right"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "alone"),
    ):
        found = probe_model(make(kind, **options), torch.device("cpu"), half=True, max_length=256, **arithmetic)
        assert found is not None
        assert found.verdict == verdict
