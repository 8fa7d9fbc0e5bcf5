"""What another layout wrote, read by the name of the parameter; and what cannot be converted, refused."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from minisft.errors import UserError
from minisft.recipe import TrainingRecipe
from minisft.training import resharding
from minisft.training.resharding import ShardedState, UnshardedState, require_reshardable, same_layout

SHAPES = {"a.weight": (3, 5), "b.weight": (7,), "norm": (2,)}  # 15 and 7 leave something over for two processes


@pytest.fixture
def values():
    """A tensor of each parameter for each kind, none like another."""
    torch.manual_seed(0)
    return {
        kind: {name: torch.rand(shape) for name, shape in SHAPES.items()} for kind in ("weight", *resharding.MOMENTS)
    }


def check(state, values):
    assert state.names() == set(SHAPES)
    assert state.steps == 4
    for name in SHAPES:
        assert torch.equal(state.weight(name), values["weight"][name].flatten())
        for kind in resharding.MOMENTS:
            assert torch.equal(state.read(name, kind), values[kind][name].flatten())


def origin(checkpoint, strategy, processes):
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "written_by.json").write_text(json.dumps({"strategy": strategy, "processes": processes}))
    return checkpoint


def test_unsharded_state_is_in_the_order_of_the_optimizer(tmp_path, values):
    groups = [["b.weight", "a.weight"], ["norm"]]
    weights = {name: torch.nn.Parameter(values["weight"][name].clone()) for name in SHAPES}
    optimizer = torch.optim.AdamW([{"params": [weights[name] for name in group]} for group in groups])
    for name, weight in weights.items():
        moments = {kind: values[kind][name] for kind in resharding.MOMENTS}
        optimizer.state[weight] = {"step": torch.tensor(4.0), **moments}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    save_file(values["weight"], tmp_path / "model.safetensors")
    check(UnshardedState(tmp_path, [name for group in groups for name in group]), values)


def test_a_state_of_another_number_of_parameters_is_refused(tmp_path):
    torch.save({"state": {}, "param_groups": [{"params": [0]}]}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match="holds 1 parameters, and 2 are trained"):
        UnshardedState(tmp_path, ["a", "b"])


def test_parameters_of_different_steps_are_refused(tmp_path):
    """Those of an expert that was not asked at a step, for example: DeepSpeed counts all as one."""
    state = {0: {"step": torch.tensor(4.0)}, 1: {"step": torch.tensor(3.0)}}
    torch.save({"state": state, "param_groups": [{"params": [0, 1]}]}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match="different numbers of steps, 3 to 4"):
        UnshardedState(tmp_path, ["a", "b"])


def test_adapters_are_found_under_the_names_that_peft_saves(tmp_path):
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    torch.save(
        {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]}, tmp_path / "optimizer.pt"
    )
    state = UnshardedState(tmp_path, ["x.lora_A.default.weight"])
    assert state.names() == {"x.lora_A.default.weight"}
    assert torch.equal(state.weight("x.lora_A.default.weight"), torch.ones(4))


def test_shards_of_stage_2_are_joined(tmp_path, values):
    """The group with decay, 22 numbers, is cut in two in the middle of its first parameter."""
    from deepspeed.utils.tensor_fragment import fragment_address

    cut = 12
    flat = {kind: torch.cat([one[name].flatten() for name in ("a.weight", "b.weight")]) for kind, one in values.items()}
    small = {kind: one["norm"] for kind, one in values.items()}
    tables = [
        [{"a.weight": (0, 12)}, {"norm": (0, 1)}],
        [{"a.weight": (0, 3), "b.weight": (3, 7)}, {"norm": (0, 1)}],
    ]
    for rank in range(2):
        pieces = [
            {kind: one[rank * cut : rank * cut + cut] for kind, one in flat.items()},
            {kind: one[rank : rank + 1] for kind, one in small.items()},
        ]
        state = {
            "param_slice_mappings": [
                {name: fragment_address(start=at, numel=size) for name, (at, size) in table.items()}
                for table in tables[rank]
            ],
            "single_partition_of_fp32_groups": [piece["weight"] for piece in pieces],
            "base_optimizer_state": {"state": {number: moments(piece) for number, piece in enumerate(pieces)}},
        }
        write_shard(tmp_path, rank, "optim", {"optimizer_state_dict": state})
    check(ShardedState(tmp_path, 2, 2), values)


def test_shards_of_stage_3_are_joined_without_their_padding(tmp_path, values):
    groups = [["a.weight", "b.weight"], ["norm"]]
    for rank in range(2):
        pieces = [
            {kind: torch.cat([part(one[name], rank) for name in group]) for kind, one in values.items()}
            for group in groups
        ]
        state = {
            "fp32_flat_groups": [piece["weight"] for piece in pieces],
            "optimizer_state_dict": {"state": {number: moments(piece) for number, piece in enumerate(pieces)}},
        }
        write_shard(tmp_path, rank, "optim", {"optimizer_state_dict": state})
        shapes = [{name: torch.Size(SHAPES[name]) for name in group} for group in groups]
        write_shard(tmp_path, rank, "model", {"param_shapes": shapes})
    check(ShardedState(tmp_path, 3, 2), values)


def moments(piece):
    return {"step": torch.tensor(4.0), **{kind: piece[kind] for kind in resharding.MOMENTS}}


def part(tensor, rank):
    """The half of a rank, padded with what no parameter may get."""
    size = (tensor.numel() + 1) // 2
    piece = tensor.flatten()[rank * size : rank * size + size]
    return torch.nn.functional.pad(piece, (0, size - len(piece)), value=99.0)


def write_shard(checkpoint, rank, kind, content):
    folder = checkpoint / "global_step4"
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")


@pytest.mark.parametrize(
    ("wrote", "asked", "same"),
    [
        (("vanilla", 2), ("vanilla", 1), True),
        (("zero2", 2), ("zero2", 2), True),
        (("zero2", 2), ("zero2", 1), False),
        (("zero2", 2), ("zero3", 2), False),
        (("vanilla", 1), ("zero1", 1), False),
    ],
)
def test_only_another_layout_is_converted(tmp_path, wrote, asked, same):
    assert same_layout(origin(tmp_path, *wrote), *asked) is same


ASKED = TrainingRecipe(strategy="vanilla", processes=1)


@pytest.mark.parametrize(
    ("changes", "precision", "said"),
    [({"optimizer": "adafactor"}, "fp32", "only AdamW's state"), ({}, "fp16", "the loss scale of fp16")],
)
def test_what_cannot_be_converted_is_refused(tmp_path, changes, precision, said):
    checkpoint = origin(tmp_path, "zero2", 2)
    with pytest.raises(UserError) as refused:
        require_reshardable(checkpoint, replace(ASKED, **changes), precision)
    assert said in str(refused.value)
    assert "training.strategy=zero2 training.processes=2" in str(refused.value)
    as_written = replace(ASKED, **changes, strategy="zero2", processes=2)
    require_reshardable(checkpoint, as_written, precision)
    require_reshardable(checkpoint, ASKED, "fp32")


def test_reading_shards_needs_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="DeepSpeed, which is not installed"):
        require_reshardable(origin(tmp_path, "zero3", 2), ASKED, "fp32")


def test_auto_resumes_with_the_strategy_of_the_checkpoint(tmp_path):
    auto = replace(ASKED, strategy="auto", optimizer="adafactor", processes=2)
    require_reshardable(origin(tmp_path, "zero3", 2), auto, "fp32")
    with pytest.raises(UserError, match="zero3 on 1 cannot take over"):
        require_reshardable(origin(tmp_path, "zero3", 2), replace(auto, processes=1), "fp32")
