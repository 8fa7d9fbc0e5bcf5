"""What single changes of a training step would gain on this machine's CPU, each against the step as it is, in turn.

    python benchmarks/cpu_candidates.py --rounds 7

A step is forward and backward of rows of short conversations, clipping and AdamW, on SmolLM2-135M in fp32. Every
round takes one step with each change, in an order of its own. The table gives the median of the ratios of a round, and
the largest relative difference of a gradient before clipping.
"""

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from minisft.models import resolve_model
from minisft.training import attention, loss
from minisft.training.batching import PackedRow
from minisft.training.device import prepare_cpu_memory
from minisft.training.loss import accumulate_embedding_gradient, row_loss
from minisft.training.optimization import clip_gradients

Finish = Callable[[], object]  # what is left to do when all rows of a step are computed
Change = Callable[[Any], AbstractContextManager[Finish]]


def nothing() -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--conversations", type=int, default=2, help="conversations of a row")
    parser.add_argument("--tokens", type=int, default=240, help="tokens of a conversation")
    parser.add_argument("--supervised", type=float, default=0.6, help="fraction of the tokens that is learned")
    parser.add_argument("--only", nargs="*", help="names of changes; default: all")
    options = parser.parse_args()
    prepare_cpu_memory("vanilla", "fp32", True)
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model("smollm2-135m").folder, dtype=torch.float32, attn_implementation=attention.PADDING_FREE
    )
    names = ["as it is", *(options.only or [name for name in CHANGES if name != "as it is"])]
    row = make_row(options.conversations, options.tokens, options.supervised)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    first = timed_step(model, optimizer, row, options.rows, nothing)
    differences: dict[str, float] = {}
    expected: list[Any] = []
    for name in names:  # this takes the time of what is allocated once, too
        with CHANGES[name](model) as finish:
            compute_gradients(model, row, options.rows, finish)
        found: list[Any] = [weight.grad for weight in model.parameters()]
        expected = expected or found
        pairs = zip(found, expected, strict=True)
        differences[name] = max(float((one - other).norm() / other.norm()) for one, other in pairs)
        optimizer.zero_grad(set_to_none=True)
    del expected, found
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(options.rounds):
        for name in order.sample(names, len(names)):
            with CHANGES[name](model) as finish:
                seconds[name].append(timed_step(model, optimizer, row, options.rows, finish))
    print(f"first step of the process, which touches gradients and moments for the first time: {first:.2f} s")
    print("| change | seconds of a step | median ratio | lowest | highest | difference of a gradient |")
    print("|---|---|---|---|---|---|")
    for name in names:
        ratios = sorted(one / base for one, base in zip(seconds[name], seconds["as it is"], strict=True))
        print(
            f"| {name} | {statistics.median(seconds[name]):.2f} | {statistics.median(ratios):.3f} "
            f"| {ratios[0]:.3f} | {ratios[-1]:.3f} | {differences[name]:.1e} |"
        )


def make_row(conversations: int, tokens: int, supervised: float) -> PackedRow:
    """Return a row of random tokens; the last of each conversation are supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (1, conversations * tokens), generator=generator)
    learned = round(tokens * supervised)
    at = torch.cat([torch.arange(tokens - learned, tokens) - 1 + tokens * one for one in range(conversations)])
    positions = torch.arange(tokens).repeat(conversations)[None]
    return PackedRow(ids, positions, (tokens,) * conversations, at, ids[0, at + 1], ())


def compute_gradients(model: Any, row: PackedRow, rows: int, finish: Finish) -> None:
    with accumulate_embedding_gradient(model) as lookups:
        for number in range(rows):
            lookups.last = number == rows - 1
            row_loss(model, row).mul(1 / (rows * len(row.targets))).backward()
    finish()


def timed_step(model: Any, optimizer: Any, row: PackedRow, rows: int, finish: Finish) -> float:
    """Take a step and return its seconds."""
    began = time.perf_counter()
    compute_gradients(model, row, rows, finish)
    clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    seconds = time.perf_counter() - began
    optimizer.zero_grad(set_to_none=True)
    return seconds


@contextmanager
def replaced_forward(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


class _AddingLinear(torch.autograd.Function):
    """A linear layer whose backward adds the gradient of its weight to `weight.grad` by the product itself."""

    @staticmethod
    def forward(ctx: Any, states: Any, weight: Any) -> Any:
        ctx.save_for_backward(states, weight)
        return linear(states, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        states, weight = ctx.saved_tensors
        outer = gradient.reshape(-1, weight.shape[0]).T, states.reshape(-1, weight.shape[1])
        by_states = gradient @ weight
        if weight.grad is None:
            return by_states, outer[0] @ outer[1]
        weight.grad.addmm_(*outer)
        return by_states, None


@contextmanager
def weight_gradients_in_place(model: Any) -> Iterator[Finish]:
    layers = [one for one in model.model.modules() if type(one) is nn.Linear]
    with replaced_forward({one: lambda states, layer=one: _AddingLinear.apply(states, layer.weight) for one in layers}):
        yield nothing


@contextmanager
def merged_products(model: Any) -> Iterator[Finish]:
    """Compute queries, keys and values, and gate and up, by one product each, of weights that lie side by side."""
    groups = [
        group
        for layer in model.model.layers
        for group in (
            (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            (layer.mlp.gate_proj, layer.mlp.up_proj),
        )
    ]
    forwards: dict[nn.Module, Any] = {}
    for group in groups:
        forwards |= _merge(group)
    with replaced_forward(forwards):
        yield nothing


class _MergedLinear(torch.autograd.Function):
    """Several linear layers on the same states, whose weights are parts of one tensor."""

    @staticmethod
    def forward(ctx: Any, states: Any, merged: Any, *weights: Any) -> Any:
        ctx.save_for_backward(states, merged)
        ctx.sizes = [len(weight) for weight in weights]
        return linear(states, merged).split(ctx.sizes, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        states, merged = ctx.saved_tensors
        gradient = torch.cat(gradients, -1)
        by_weight = gradient.reshape(-1, len(merged)).T @ states.reshape(-1, merged.shape[1])
        return gradient @ merged, None, *by_weight.split(ctx.sizes)


def _merge(layers: tuple[Any, ...]) -> dict[nn.Module, Any]:
    merged = layers[0].__dict__.get("_side_by_side")
    if merged is None:
        merged = torch.cat([one.weight.data for one in layers])
        for one, part in zip(layers, merged.split([len(one.weight) for one in layers]), strict=True):
            one.weight.data = part
        object.__setattr__(layers[0], "_side_by_side", merged)
    results: list[Any] = []

    def first(states: Any) -> Any:
        results[:] = _MergedLinear.apply(states, merged, *(one.weight for one in layers))
        return results[0]

    rest = {one: (lambda states, number=number: results[number]) for number, one in enumerate(layers)}
    return {**rest, layers[0]: first}


@contextmanager
def batched_attention(model: Any) -> Iterator[Finish]:
    """Compute the attention of all conversations of a row at once: the best case, since all have the same length."""

    def attend(q: Any, k: Any, v: Any, lengths: Any, shape: Any, dropout: float = 0.0, sinks: Any = None) -> Any:
        q, k, v = (one.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for one in (q, k, v))
        output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.scaling, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1)

    with patch.object(attention, "per_conversation_attention", attend):
        yield nothing


@contextmanager
def without_clipping(model: Any) -> Iterator[Finish]:
    """Leave out the product of all gradients with the clipping factor: the most that skipping it could gain."""
    with patch.object(torch.nn.utils, "clip_grads_with_norm_", lambda *_: None):
        yield nothing


@contextmanager
def output_layer_in_place(model: Any) -> Iterator[Finish]:
    """Add up the gradient of the output layer over the rows of a step in one tensor, and scale it once."""
    sums: list[torch.Tensor] = []
    factors: list[torch.Tensor] = []

    class Summed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, *_: Any) -> Any:
            by_hidden, losses = torch.zeros_like(hidden), torch.zeros(len(targets))
            length = loss.chunk_length(len(weight), True)
            for start in range(0, len(targets), length):
                part = slice(start, start + length)
                losses[part], gradient = loss._losses_and_gradient(linear(hidden[part], weight), targets[part])
                by_hidden[part] = gradient @ weight
                if sums:
                    sums[0].addmm_(gradient.T, hidden[part])
                else:
                    sums.append(gradient.T @ hidden[part])
            ctx.mark_non_differentiable(losses)
            ctx.by_hidden = by_hidden
            return losses.sum(), losses

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, factor: Any, _: Any) -> Any:
            factors[:] = [factor]  # the same for all rows of a step
            return ctx.by_hidden.mul_(factor), None, None, None, None, None

    def deliver() -> None:
        weight = model.get_output_embeddings().weight
        total = sums.pop().mul_(factors[0])
        weight.grad = total if weight.grad is None else weight.grad.add_(total)

    with patch.object(loss, "_SumOfLosses", Summed):
        yield deliver


@contextmanager
def all_in_place(model: Any) -> Iterator[Finish]:
    with weight_gradients_in_place(model), output_layer_in_place(model) as deliver, without_clipping(model):
        yield deliver


CHANGES: dict[str, Change] = {
    "as it is": lambda model: contextlib.nullcontext(nothing),
    "weight gradients added by the product": weight_gradients_in_place,
    "the same for the output layer": output_layer_in_place,
    "no product with the clipping factor": without_clipping,
    "these three": all_in_place,
    "q/k/v and gate/up as one product each": merged_products,
    "attention of equally long conversations at once": batched_attention,
}

if __name__ == "__main__":
    main()
