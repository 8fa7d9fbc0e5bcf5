"""The modules that get adapters: all linear ones, but for those that the kernels of Mamba layers would read without."""

import pytest

from minisft.errors import UserError
from minisft.recipe import LoraRecipe
from minisft.training.lora import add_lora, modules_without_adapters
from tests.unit.training.test_probe import make

MAMBA = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}


def adapted(model):
    return {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(".lora_A")}


def with_lora(kind, target_modules="all-linear", **sizes):
    lora = LoraRecipe(rank=2, alpha=4.0, target_modules=target_modules)
    model = make(kind, **sizes)
    return add_lora(model, lora, base_name=model.name_or_path, seed=0)


def test_all_linear_adapts_every_linear_module_but_the_output_layer():
    assert modules_without_adapters(make("llama")) is None
    assert adapted(with_lora("llama")) == {f"{one}_proj" for one in ("q", "k", "v", "o", "gate", "up", "down")}


def test_all_linear_leaves_out_what_peft_refuses_in_mamba_layers():
    assert modules_without_adapters(make("mamba2", **MAMBA)) == ["out_proj"]
    assert adapted(with_lora("mamba2", **MAMBA)) == {"in_proj"}


def test_a_module_that_is_refused_by_name_is_an_error_with_the_names_to_choose_from():
    with pytest.raises(UserError, match="out_proj.*incompatible") as refused:
        with_lora("mamba2", ["out_proj"], **MAMBA)
    assert "in_proj" in refused.value.fix
    assert "all-linear" in refused.value.fix


def test_layers_that_store_their_weights_transposed_are_named_too():
    with pytest.raises(UserError) as unknown:
        with_lora("gpt2", ["nothing"], n_embd=32, n_head=4, n_layer=2)
    assert "c_attn" in unknown.value.fix
    assert "lm_head" not in unknown.value.fix
