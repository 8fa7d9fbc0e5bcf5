"""A CPU's rate is measured on layers of the planned model, where they can be tried."""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from minisft.planning.machines import GPUS, with_layer_benchmark
from minisft.planning.model_cost import ModelCosts
from minisft.recipe import LoraRecipe

CPU = replace(
    GPUS["l40s"], name="cpu", kind="cpu", flops={"fp32": 1e11}, utilisation=0.75, per_node=2, measured=True, source="x"
)


@pytest.fixture
def config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=9, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=511,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_are_tried_in_the_precision(config, precision):
    machine = with_layer_benchmark(CPU, config, precision, 1)
    assert list(machine.flops) == [precision]
    assert 1e7 < machine.flops[precision] < 1e14
    assert "layers of this model, on 2 cores" in machine.source
    assert (config.num_hidden_layers, config.vocab_size) == (9, 512)


class Products(TorchFunctionMode):
    """Notes the number format of the weight of each product, and whether autocast is on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            self.seen.add((args[1].dtype, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "lora", "products"),
    [
        ("fp32", None, {(torch.float32, False)}),
        ("bf16", None, {(torch.bfloat16, False)}),  # bf16 weights of fp32 masters
        ("bf16", LoraRecipe(rank=2), {(torch.bfloat16, True), (torch.float32, True)}),  # frozen weights, adapters
    ],
)
def test_layers_compute_as_training_does(config, precision, lora, products):
    found = Products()

    def timed(work):
        with found:
            work()
        return 1.0

    assert with_layer_benchmark(CPU, config, precision, 1, lora=lora, shortest_time=timed) is not CPU
    assert found.seen == products


def test_the_rate_is_that_of_the_operations_that_the_model_cost_counts(config):
    machine = with_layer_benchmark(CPU, config, "fp32", 2, lengths=(30, 10), shortest_time=lambda work: 2.0)
    config.num_hidden_layers = 2
    cost = ModelCosts(config).of("fp32")
    operations = 40 * cost.step_flops(False) + cost.attention_flops(30**2 + 10**2, False)
    assert machine.flops["fp32"] == pytest.approx(operations / 2.0 / 2)  # two seconds, two processes


def test_large_layers_are_not_tried(config):
    assert with_layer_benchmark(CPU, config, "fp32", 1, most_parameters=1e4) is CPU


def test_a_model_that_cannot_be_tried_leaves_the_machine():
    assert with_layer_benchmark(CPU, object(), "fp32", 1) is CPU
