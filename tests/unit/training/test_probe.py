"""The probe finds models that are wrong for packed rows, for every row, or beyond a window; and names no right one."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from minisft.errors import UserError
from minisft.models import load_model
from minisft.training import attention
from minisft.training.batching import pack_sequences
from minisft.training.loss import row_loss
from minisft.training.probe import Probe, refuse_wrong_model
from tests.tiny import SINCE_TRANSFORMERS_5_20

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
    """Return a tiny random model as training loads it; its weights are large enough for a leak to show."""
    model = with_large_weights(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | options)))
    attention.register()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_model(Path(folder), dtype=torch.float32, attention=attention.PADDING_FREE)


def with_large_weights(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    return model


def probe(model, **options):
    options = {"half": False, "max_length": 256} | options
    return Probe(model, torch.device("cpu"), contextlib.nullcontext, **options).run()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 16}),
        ("mistral", {"sliding_window": 16}),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
        ("gpt_neox", {}),
        ("gemma2", {"head_dim": 8, "sliding_window": 16}),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 16}),
        ("granite_swa", {"sliding_window": 16}),
        ("jetmoe", {"kv_channels": 8, "num_local_experts": 4}),
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
    ("kind", "options", "found", "words"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "eager", "no other attention"),
        ("codegen", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, "eager", "no other attention"),
        ("gptj", {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, "eager", "no other attention"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_heads": 4}, "eager", "no other attention"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "eager", "no other attention"),
        ("falcon", {"alibi": True}, "sdpa", "no other attention"),
        ("xglm", {"d_model": 32, "attention_heads": 4, "ffn_dim": 64, "num_layers": 2}, "eager", "no other attention"),
        ("openai-gpt", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "eager", "no other attention"),
        ("stablelm", {}, "sdpa", "does not pass the lengths of a row to its attention"),
        ("nemotron", {}, "sdpa", "does not pass the lengths of a row to its attention"),
        ("doge", {}, "sdpa", "makes an attention mask of its own"),
        ("phimoe", {"sliding_window": 64, "num_local_experts": 4}, "sdpa", "longer than the model's window"),
        (
            "llama4_text",
            {"attention_chunk_size": 64, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
            "sdpa",
            "longer than the model's window",
        ),
    ],
)
def test_other_models_are_right_with_the_attention_of_transformers(kind, options, found, words):
    if kind == "doge" and not SINCE_TRANSFORMERS_5_20:
        pytest.skip("an older Doge is refused")
    model = make(kind, **options)
    result = probe(model)
    assert (result.verdict, result.attention, model.config._attn_implementation) == ("alone", found, found)
    assert result.isolation is None
    assert words in result.reason
    refuse_wrong_model(kind, result)
    # The loss of the training is that of a plain call.
    ids = np.arange(30) % 17 + 3
    model.eval()
    loss = row_loss(model, pack_sequences([(ids, ids)]), result.call)
    logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_a_model_whose_attention_is_not_causal_is_refused():
    result = probe(make("bert", is_decoder=False))
    assert result.verdict == "refused"
    with pytest.raises(UserError, match="a token changes the predictions of tokens before it"):
        refuse_wrong_model("bert", result)


class TakesBoundaries(LlamaForCausalLM):
    """A convolution over the row, which a kernel resets where the number of the conversation changes."""

    has_kernel = True

    def forward(self, input_ids=None, seq_idx=None, **options):
        states = self.model.embed_tokens(input_ids)
        if seq_idx is not None and not self.has_kernel:
            raise ValueError("no packed sequences without a kernel")
        before = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
        if seq_idx is not None:
            before = before * (seq_idx == seq_idx.roll(1, 1))[..., None]
        return super().forward(inputs_embeds=states + before, **options)


@pytest.mark.parametrize("has_kernel", [True, False])
def test_boundaries_are_passed_to_layers_that_run_across_the_row_if_their_kernels_take_them(has_kernel):
    attention.register()
    config = AutoConfig.for_model("llama", **SMALL)
    model = TakesBoundaries._from_config(config, attn_implementation=attention.PADDING_FREE)
    with_large_weights(model).has_kernel = has_kernel
    result = probe(model)
    assert (result.verdict, result.call.boundaries) == (("right", True) if has_kernel else ("alone", False))
    assert result.attention == attention.PADDING_FREE
    # A row of several conversations, or each alone, as the verdict says.
    parts = [(ids, ids) for ids in (np.arange(3, 20), np.arange(7, 18))]
    model.eval()
    alone = torch.stack([row_loss(model, pack_sequences([part]), result.call) for part in parts]).sum()
    together = row_loss(model, pack_sequences(parts), result.call)
    assert torch.isclose(alone, together, rtol=1e-4) == has_kernel


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
        found = Probe(make(kind, **options), torch.device("cpu"), half=True, max_length=256, **arithmetic).run()
        assert found is not None
        assert found.verdict == verdict


class PassesOptionsOn(LlamaForCausalLM):
    def forward(self, input_ids=None, **options):
        return super().forward(input_ids, **options)


def test_a_forward_that_passes_its_options_on_takes_what_the_overridden_one_takes():
    attention.register()
    config = AutoConfig.for_model("llama", **SMALL)
    model = PassesOptionsOn._from_config(config, attn_implementation=attention.PADDING_FREE)
    result = probe(with_large_weights(model))
    assert (result.verdict, result.call.position_ids, result.call.selects_logits) == ("right", True, True)
