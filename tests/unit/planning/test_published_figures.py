"""Formulas against published figures: a 7B model, from one GPU to many."""

from dataclasses import replace
from pathlib import Path

import pytest

from minisft.planning.machines import GPUS
from minisft.planning.memory import Setting, memory_of, model_states
from minisft.planning.model_cost import ModelCost, count_cost, read_config
from minisft.planning.prediction import traffic
from minisft.recipe import LoraRecipe

MODELS = Path(__file__).parent / "models"
GIB = 1 << 30


def sized(parameters):
    return ModelCost(
        parameters=parameters, trainable=parameters, largest=100_000_000, tied=False, layers=32, hidden_size=4096,
        vocabulary=32000, activation_bytes=0, constant_bytes=0, stream_bytes=8192, forward_flops=0, backward_flops=0,
        attention_width=0,
    )  # fmt: skip


def on_gpus(strategy, processes, **more):
    return Setting(strategy=strategy, processes=processes, half=True, on_cpu=False, **more)


@pytest.mark.parametrize(
    ("processes", "zero1", "zero2", "zero3"),
    [(4, 52.5, 41.3, 30.0), (16, 35.6, 21.6, 7.5), (64, 31.4, 16.6, 1.88), (256, 30.4, 15.4, 0.47)],
)
def test_table_1_of_the_zero_paper(processes, zero1, zero2, zero3):
    """Rajbhandari et al. 2020 (arXiv 1910.02054), table 1: model states in GB of 7.5B parameters."""
    for strategy, published in (("zero1", zero1), ("zero2", zero2), ("zero3", zero3)):
        assert sum(model_states(sized(7.5e9), on_gpus(strategy, processes))) / 1e9 == pytest.approx(published, rel=0.02)


def test_sixteen_bytes_a_parameter():
    """The ZeRO paper, section 3.1: 16 bytes, here 4 + 4 + 8, since vanilla's weights are fp32 in fp16."""
    assert sum(model_states(sized(7.5e9), on_gpus("vanilla", 8))) == 16 * 7.5e9


@pytest.mark.parametrize(
    ("strategy", "states"),
    [
        ("vanilla", (2, 4, 12)),
        ("zero1", (2, 2, 12 / 8)),
        ("zero2", (2, 4 / 8, 12 / 8)),
        ("zero3", (2 / 8, 4 / 8, 12 / 8)),
    ],
)
def test_bf16_adds_two_bytes_for_sums_of_gradients_in_fp32(strategy, states):
    """As with Megatron's distributed optimizer: 18 bytes a parameter (its README, "Distributed Optimizer", "bf16")."""
    found = model_states(sized(1e9), on_gpus(strategy, 8, bf16=True))
    assert found == tuple(size * 1e9 for size in states)


@pytest.mark.parametrize("parameters", [7.24e9, 8.03e9])
def test_deepspeed_estimates_for_eight_gpus(parameters):
    """DeepSpeed's own tables (deepspeed.readthedocs.io, Memory Requirements) come from these functions."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, second = estimate_zero2_model_states_mem_needs(parameters, num_gpus_per_node=8, cpu_offload=False)
    _, third, _ = estimate_zero3_model_states_mem_needs(
        parameters, largest_layer_params=131e6, num_gpus_per_node=8, cpu_offload=False, cpu_offload_params=False
    )
    for strategy, published in (("zero2", second), ("zero3", third)):
        states = sum(model_states(sized(parameters), on_gpus(strategy, 8)))
        assert states + 4 * parameters / 8 == pytest.approx(published, rel=0.15)  # the step has the gradients in fp32


def test_deepspeed_estimate_with_offload():
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    host, device = estimate_zero2_model_states_mem_needs(
        7.24e9, num_gpus_per_node=8, cpu_offload=True, additional_buffer_factor=1.0
    )
    memory = memory_of(sized(7.24e9), on_gpus("zero2", 8, offload=True), (0, 0), 1)
    assert memory.parameters == pytest.approx(device, rel=0.15)
    assert 8 * memory.host == pytest.approx(16 * 7.24e9, rel=0.15)
    assert host == 32 * 7.24e9  # DeepSpeed adds 4 bytes a parameter and process while it starts


def test_torchtune_lora_llama3_8b():
    """torchtune's README, September 2024: Llama 3.1 8B, LoRA, batch 2 of 2,048 tokens, on a 4090: 16.2 GiB.

    Its configuration 8B_lora_single_device: bf16, rank 8, activation checkpointing, and a loss in chunks, so the
    logits are left out here.
    """
    lora = LoraRecipe(rank=8)
    cost = count_cost(read_config(MODELS / "llama3-8b"), "half", lora)
    memory = memory_of(cost, on_gpus("vanilla", 1, checkpointing=True, lora=lora), (4096, 4096), 1)
    assert (memory.peak - memory.logits) / GIB == pytest.approx(16.2, rel=0.15)


def test_torchtune_lora_llama2_7b():
    """torchtune's README, version 0.1: Llama2-7B, LoRA, batch 4 of 2,048 tokens, on a 4090: 21.3 GB."""
    lora = LoraRecipe(rank=8)
    config = read_config(MODELS / "mistral-7b")
    config.update({"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32})
    cost = replace(count_cost(config, "half", lora), all_logits=True)  # its loss had no chunks yet
    assert cost.parameters - cost.trainable == 6_738_415_616
    memory = memory_of(cost, on_gpus("vanilla", 1, checkpointing=True, lora=lora), (8192, 8192), 1)
    assert memory.peak / 1e9 == pytest.approx(21.3, rel=0.15)


def test_traffic_of_the_zero_paper():
    """Section 7: data parallelism and ZeRO-1 and 2 move 2 values a parameter, ZeRO-3 moves 3; all-reducing costs one more.

    DeepSpeed on gradients of half precision, as vanilla in bf16; in fp16 it all-reduces fp32.
    """
    cost, moved = sized(7.5e9), 63 / 64 * 7.5e9
    assert traffic(cost, on_gpus("vanilla", 64), rows=4) == 2 * 4 * moved
    assert traffic(cost, on_gpus("vanilla", 64, bf16=True), rows=4) == 2 * 2 * moved
    assert traffic(cost, on_gpus("zero1", 64), rows=4) == 3 * 2 * moved
    assert traffic(cost, on_gpus("zero3", 64), rows=1) == 3 * 2 * moved
    assert traffic(cost, on_gpus("zero3", 64), rows=4) == 12 * 2 * moved
    assert traffic(cost, replace(on_gpus("zero3", 64), processes=1), rows=4) == 0


def test_data_sheets():
    assert GPUS["h100"].flops["bf16"] == 989e12
    assert GPUS["a100"].flops["bf16"] == 312e12
    assert 70e9 < GPUS["h100"].memory < 80e9
