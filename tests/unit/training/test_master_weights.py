"""bf16 weights with fp32 masters: what is summed, updated, rounded and saved, and in which number format."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from minisft.cli import main
from minisft.run_folder import RunFolder
from minisft.training.master_weights import MasterWeights, uses_masters
from tests.padded import logged_steps

ROWS = [torch.linspace(-1, 1, 8).roll(shift)[None] * (1 + shift) for shift in range(3)]


class Tied(nn.Module):
    """Two layers that share a matrix, and a norm."""

    _keep_in_fp32_modules_strict = ("nor*",)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(8)
        self.bias = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, row):
        hidden = self.second(torch.tanh(self.first(row.to(self.first.weight.dtype)))) + self.bias
        return self.norm(hidden.float())


def backward_of(model, row):
    """Backward of a row on a model whose gradients are empty; returns the gradients by name."""
    model.zero_grad()
    (model(row) ** 2).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def summed(masters, weight):
    """The gradient in the master of a weight."""
    gradient = masters.of(weight).grad
    assert gradient is not None
    return gradient


def rounded_model():
    """The model with the weights of `Tied` in bf16 where `MasterWeights` has them, and no masters."""
    model = Tied()
    model.first.weight = model.second.weight = nn.Parameter(model.first.weight.detach().bfloat16())
    model.bias = nn.Parameter(model.bias.detach().bfloat16(), requires_grad=False)
    return model


def test_the_model_computes_with_rounded_weights_and_shows_the_exact_ones_where_asked():
    model: Any = Tied()
    exact = Tied().state_dict()
    masters = MasterWeights(model)
    assert [weight.dtype for weight in model.parameters()] == [torch.bfloat16, torch.bfloat16, *[torch.float32] * 2]
    assert model.first.weight is model.second.weight
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["bias"]
    torch.testing.assert_close(model(ROWS[0]), rounded_model()(ROWS[0]), rtol=0, atol=0)
    with masters.in_fp32():
        assert model.first.weight is model.second.weight is masters.of(model.first.weight)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in exact.items())
    assert model.first.weight.dtype == torch.bfloat16


def test_gradients_of_rows_are_summed_in_fp32():
    model: Any = Tied()
    masters = MasterWeights(model)
    for row in ROWS:
        (model(row) ** 2).sum().backward()
    rows = [backward_of(rounded_model(), row)["first.weight"] for row in ROWS]
    assert rows[0].dtype == torch.bfloat16
    expected = rows[0].float() + rows[1].float() + rows[2].float()
    assert model.first.weight.grad is None
    assert torch.equal(summed(masters, model.first.weight), expected)
    assert not torch.equal((rows[0] + rows[1] + rows[2]).float(), expected)


def test_ddp_reduces_the_sum_of_the_rows_in_bf16(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model: Any = Tied()
        masters = MasterWeights(model)
        seen = []
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

        def all_reduce(_, bucket):
            seen.append((bucket.buffer().dtype, bucket.buffer().numel()))
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer().mul_(2))  # as if another process had had the same rows
            return done

        wrapped.register_comm_hook(None, all_reduce)
        expected = sum(backward_of(rounded_model(), row)["first.weight"].float() for row in ROWS).bfloat16().float()
        for _ in range(2):  # DDP makes its buckets anew after the first step
            for number, row in enumerate(ROWS):
                masters.reducing = number == len(ROWS) - 1
                with wrapped.no_sync() if not masters.reducing else torch.enable_grad():
                    (wrapped(row) ** 2).sum().backward()
            masters.collect_reduced()
            assert torch.equal(summed(masters, model.first.weight), 2 * expected)
            assert model.first.weight.grad is None
            masters.of(model.first.weight).grad = None
            model.zero_grad()
        assert seen.count((torch.bfloat16, 64)) == 2
    finally:
        distributed.destroy_process_group()


def test_steps_that_bf16_cannot_hold_add_up():
    model: Any = Tied()
    masters = MasterWeights(model)
    with masters.in_fp32():
        optimizer = torch.optim.SGD([model.first.weight], lr=1.0)
    masters.update_with(optimizer)
    master, start = masters.of(model.first.weight), model.first.weight.detach().clone()
    step = master.detach().abs() * 2**-10  # a quarter of a unit in the last place, at most
    for number in range(1, 9):
        master.grad = -step.sign() * step
        optimizer.step()
        assert torch.equal(model.first.weight, master.bfloat16())
        assert master.grad is None
        if number == 1:
            unchanged = (model.first.weight == start).float().mean()
            assert unchanged > 0.3
    assert (model.first.weight == start).float().mean() < 0.1


@pytest.mark.parametrize(
    ("strategy", "precision", "lora", "expected"),
    [("vanilla", "bf16", False, True), ("vanilla", "bf16", True, False), ("vanilla", "fp16", False, False),
     ("vanilla", "fp32", False, False), ("zero2", "bf16", False, False)],
)  # fmt: skip
def test_who_keeps_masters(strategy, precision, lora, expected):
    assert uses_masters(strategy, precision, lora=lora) is expected


BF16 = ("training.precision=bf16", "training.scheduler=constant", "training.warmup_ratio=0", "training.epochs=1")


def test_a_run_saves_its_masters_and_resumes_to_the_same_bits(recipe_file, tmp_path):
    whole, halves = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "halves")
    words = ("train", str(recipe_file), *BF16)
    assert main([*words, f"output={whole.root}"]) == 0
    assert main([*words, f"output={halves.root}", "training.max_steps=2"]) == 0
    assert main([*words, f"output={halves.root}", "training.max_steps=4", "--resume"]) == 0
    ours, expected = (load_file(run.model / "model.safetensors") for run in (halves, whole))
    assert json.loads((whole.model / "config.json").read_text())["dtype"] == "float32"
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert weight.dtype == torch.float32
        assert torch.equal(ours[name], weight)
        assert not torch.equal(weight, weight.bfloat16().float())
    assert [line["loss"] for line in logged_steps(halves)] == [line["loss"] for line in logged_steps(whole)]
