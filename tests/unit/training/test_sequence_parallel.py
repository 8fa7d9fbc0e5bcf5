"""Processes that share the tokens of a row: losses and gradients are those of the complete row."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from minisft.errors import UserError
from minisft.recipe import TrainingRecipe
from minisft.training import attention
from minisft.training.batching import pack_sequences
from minisft.training.loss import row_losses
from minisft.training.model_call import ModelCall
from minisft.training.probe import Probe
from minisft.training.sequence_parallel import SequenceGroup, make_group, require_divisible

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {"model_type": "llama", **HEADS},
    "fewer key heads than processes": {"model_type": "llama", **HEADS, "num_key_value_heads": 1},
    "key heads that 2 does not divide": {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "a sliding window and a soft cap": {"model_type": "gemma2", **HEADS, "sliding_window": 6},
    "attention sinks": {"model_type": "gpt_oss", **HEADS, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def model_of(model_type, **settings):
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)


def three_conversations():
    """Return a row of 13, 1 and 9 tokens, which no number above 1 divides, with gaps in what is supervised."""
    random = np.random.default_rng(0)
    conversations = []
    for length in (13, 1, 9):
        ids = random.integers(1, 60, length)
        conversations.append((ids, np.where(random.random(length) < 0.6, ids, -100)))
    return pack_sequences(conversations, (4, 5, 6))


def compare(name, group, checkpointing):
    """Compare losses and gradients of a row that the group shares with those of the complete row."""
    model = model_of(**MODELS[name]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    row = three_conversations()
    found = []
    for shared in (False, True):
        model.zero_grad()
        call = ModelCall(sequence_group=group)
        total, losses = row_losses(model, group.part_of(row) if shared else row, call)
        total.backward()
        values = [torch.zeros(()) if weight.grad is None else weight.grad.clone() for weight in model.parameters()]
        every = [total.detach(), losses.sum(), *values]
        for value in every if shared else ():
            torch.distributed.all_reduce(value)  # the sum over the group
        found.append(every)
    for complete, summed in zip(*found, strict=True):
        torch.testing.assert_close(summed, complete, rtol=2e-4, atol=1e-5)


def in_a_process_of_two(rank, rendezvous):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    group = make_group(2)
    assert group is not None
    assert (group.size, group.rank) == (2, rank)
    for name in MODELS:
        compare(name, group, checkpointing=False)
    compare("grouped queries", group, checkpointing=True)
    # The probe accepts a model whose tokens meet in attention alone, and refuses one with recurrent layers.
    for model, refused in ((model_of("llama", **HEADS), False), (model_of("falcon_h1", **HEADS, **MAMBA), True)):
        probe = Probe(model, torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False), False, 100)
        call = ModelCall(sequence_group=group)
        if refused:
            with pytest.raises(UserError, match="computes a row differently if processes share it"):
                probe.refuse_unshareable_model(call, group)
        else:
            probe.refuse_unshareable_model(call, group)
    torch.distributed.destroy_process_group()


def test_two_processes_compute_the_losses_and_gradients_of_the_complete_row(tmp_path):
    torch.multiprocessing.spawn(in_a_process_of_two, (str(tmp_path / "rendezvous"),), nprocs=2)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_parts_of_a_row_are_the_row(size):
    row = three_conversations()
    parts = [SequenceGroup(None, size, rank).part_of(row) for rank in range(size)]
    ids = torch.cat([part.input_ids for part in parts], 1)
    assert torch.equal(ids[:, :23], row.input_ids)
    assert len({part.input_ids.shape for part in parts}) == 1
    assert parts[0].lengths[:3] == row.lengths
    assert sum(parts[0].lengths) == ids.shape[1]
    assert torch.equal(torch.cat([part.predict_at + part.start for part in parts]), row.predict_at)
    assert torch.equal(torch.cat([part.targets for part in parts]), row.targets)
    positions = torch.cat([part.position_ids for part in parts], 1)
    assert positions[0].tolist() == [at for length in parts[0].lengths for at in range(length)]


def test_a_row_without_conversations_is_shared_too():
    token, nothing = torch.zeros((1, 1), dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    row = type(three_conversations())(token, token, (1,), nothing, nothing, ())
    part = SequenceGroup(None, 2, 1).part_of(row)
    assert part.input_ids.shape == (1, 1)
    assert part.lengths == (1, 1)


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "copies"), [(8, 4, 2, 1), (8, 2, 4, 2), (8, 1, 8, 8), (6, 3, 2, 2)]
)
def test_key_heads_are_copied_as_often_as_the_processes_need(heads, key_heads, size, copies):
    states = torch.arange(key_heads)[None, :, None, None].float()
    repeated = SequenceGroup(None, size, 0).repeat_key_heads(states, heads)
    assert repeated.flatten().tolist() == [float(head) for head in range(key_heads) for _ in range(copies)]


def test_heads_that_cannot_be_shared_are_refused_before_the_model_is_loaded():
    config = LlamaConfig(hidden_size=48, num_attention_heads=12, num_key_value_heads=4)
    require_divisible(config, 4, 8)
    with pytest.raises(UserError, match="8 processes cannot share the 12 attention heads") as raised:
        require_divisible(config, 8, 8)
    assert raised.value.fix == "give a divisor of 12, such as 6"
    with pytest.raises(UserError, match="4 does not divide the 6 processes of this launch"):
        require_divisible(config, 4, 6)


def test_positions_that_depend_on_the_length_of_a_forward_are_refused():
    rotary = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(num_attention_heads=4, rope_parameters=rotary)
    require_divisible(config, 1, 1)
    with pytest.raises(UserError, match="dynamic"):
        require_divisible(config, 2, 2)


def test_a_number_that_does_not_divide_the_processes_is_refused():
    assert TrainingRecipe(processes=8, sequence_parallel=4, batch_size=3, gradient_accumulation=2).global_batch == 12
    with pytest.raises(UserError, match="training.sequence_parallel: 3 does not divide training.processes, which is 4"):
        TrainingRecipe(processes=4, sequence_parallel=3)
