"""What is counted on the meta device equals what a real forward keeps, and what the literature says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

from minisft.planning.model_cost import count_cost, read_config
from minisft.recipe import LoraRecipe
from minisft.training import attention
from minisft.training.lora import add_lora

MODELS = Path(__file__).parent / "models"
SMALL: dict[str, Any] = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = 96


def kept_in_a_real_forward(model, tokens):
    """Bytes of the distinct storages that autograd keeps, without the weights."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, 300, (1, tokens))
    body = getattr(model, "get_base_model", lambda: model)().base_model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        body(
            input_ids=ids, position_ids=torch.arange(tokens)[None], use_cache=False, conversation_lengths=(40, tokens - 40)
        )  # fmt: skip
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2),
        Qwen2Config(**SMALL, intermediate_size=96, num_key_value_heads=4),
        GPTNeoXConfig(**SMALL, intermediate_size=192),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("lora", [None, LoraRecipe(rank=4)], ids=["full", "lora"])
def test_counts_what_a_real_forward_keeps(config, lora):
    attention.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE, dtype=torch.float32)
    if lora is not None:
        model = add_lora(model, lora, base_name="x", seed=0)
    kept = kept_in_a_real_forward(model.train(), TOKENS)
    assert count_cost(config, "fp32", lora).activation_bytes * TOKENS == pytest.approx(kept, rel=0.02)


def test_agrees_with_korthikanti_et_al_2022():
    """Equation 2 without the attention scores: 34 s b h bytes a layer in half precision, of which 2 are dropout masks.

    Two more bytes for each unit of width: the conversations' attention outputs are copied into one tensor, end to end.
    """
    width, layers = 256, 12
    config = GPT2Config(
        vocab_size=320, n_embd=width, n_layer=layers, n_head=8, activation_function="gelu", resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    cost = count_cost(config, "half")
    assert cost.activation_bytes / layers == pytest.approx((34 - 2 + 2) * width, rel=0.03)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mistral-7b", 7_248_023_552), ("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496)],
)
def test_published_models(name, parameters):
    """The sizes that the safetensors indexes of these models give; 6 operations a weight and token (Kaplan et al.)."""
    cost = count_cost(read_config(MODELS / name), "half")
    assert cost.parameters == cost.trainable == parameters
    in_products = parameters - 2 * cost.vocabulary * cost.hidden_size  # neither embedding nor output layer
    assert cost.forward_flops == pytest.approx(2 * in_products, rel=1e-3)
    assert cost.step_flops(checkpointing=False) == pytest.approx(6 * in_products, rel=1e-3)
    assert cost.step_flops(checkpointing=True) == pytest.approx(8 * in_products, rel=1e-3)


def test_half_precision_keeps_half_and_autocast_copies_weights():
    config = LlamaConfig(**SMALL, intermediate_size=96)
    exact, half, autocast = (count_cost(config, name) for name in ("fp32", "half", "autocast"))
    assert half.activation_bytes < 0.6 * exact.activation_bytes
    assert half.activation_bytes < autocast.activation_bytes < exact.activation_bytes
    layers = 3 * (4 * 48 * 48 + 3 * 48 * 96)
    assert (exact.constant_bytes, half.constant_bytes, autocast.constant_bytes) == (0, 0, 2 * layers)


@pytest.mark.parametrize(("mode", "size"), [("half", 2), ("fp32", 4)])
@pytest.mark.parametrize("layers", [3, 12])  # counted directly, and extrapolated from two shallow models
def test_liger_keeps_less_for_each_norm_and_mlp(mode, size, layers):
    """A norm keeps its input in place of an fp32 copy and the normalised input; an MLP no activation of its gate."""
    config = LlamaConfig(**SMALL | {"num_hidden_layers": layers}, intermediate_size=96)
    plain, liger = count_cost(config, mode), count_cost(config, mode, liger=True)
    saved = (2 * layers + 1) * 4 * 48 + layers * size * 96
    assert plain.activation_bytes - liger.activation_bytes == pytest.approx(saved, abs=1e-6)
    assert (liger.parameters, liger.step_flops(False)) == (plain.parameters, plain.step_flops(False))


def test_a_model_without_known_kernels_is_counted_with_its_own_code():
    config = GPTNeoXConfig(**SMALL, intermediate_size=192)
    assert count_cost(config, "half", liger=True) == count_cost(config, "half")


def test_the_cache_of_a_token_has_the_keys_and_values_of_all_layers():
    config = LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2)
    assert count_cost(config, "half").cache_width == 3 * 2 * 2 * 12


def test_lora_trains_the_adapters_alone_at_two_thirds_of_the_operations():
    config = LlamaConfig(**SMALL, intermediate_size=96)
    full, lora = count_cost(config, "fp32"), count_cost(config, "fp32", LoraRecipe(rank=1))
    assert lora.trainable == 3 * (4 * (48 + 48) + 3 * (48 + 96))
    assert lora.parameters == full.parameters + lora.trainable
    assert lora.backward_flops < 0.65 * full.backward_flops


@pytest.mark.parametrize("layers", [3, 12])  # counted directly, and extrapolated from two shallow models
def test_adapted_width_is_that_of_the_outputs_of_layers_with_adapters(layers):
    config = LlamaConfig(**SMALL | {"num_hidden_layers": layers}, intermediate_size=96, num_key_value_heads=2)
    assert count_cost(config, "fp32", LoraRecipe(rank=4)).adapted_width == layers * (48 + 2 * 24 + 48 + 2 * 96 + 48)
    assert count_cost(config, "fp32").adapted_width == 0


@pytest.mark.parametrize(
    ("config", "at_once"),
    [
        (LlamaConfig(**SMALL, intermediate_size=96), False),
        (CohereConfig(**SMALL, intermediate_size=96), True),
        (PhiConfig(**SMALL, intermediate_size=96), True),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_which_models_have_all_logits_at_once(config, at_once):
    """A scale after the output layer, and a bias in it."""
    assert count_cost(config, "fp32").all_logits is at_once
