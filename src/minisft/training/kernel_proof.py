"""Whether kernels compute what a model's own code computes: the first layers, forward and backward, on a few tokens.

The layers run as in training, with MiniSFT's attention and on the device of the training, but on copies of their
weights: the model may still be on the CPU, or sharded by ZeRO-3, when its kernels are chosen.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from minisft.training.batching import pack_sequences
from minisft.training.master_weights import uses_masters
from minisft.training.model_call import ModelCall

# Largest relative difference of a tensor that rounding explains. In fp32 the kernels of Liger differ by 2e-7. In bf16 a
# model's own code differs from its fp32 results by 0.006 to 0.013 (SmolLM2-135M, small Llamas and Qwen3s).
FP32_TOLERANCE, HALF_TOLERANCE = 1e-4, 0.03
_LENGTHS = (19, 13)  # tokens of the two conversations
_FAINT = 1e-3  # A gradient this much weaker than the strongest is compared with that one: it may be rounding alone.
_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Proof:
    """What a model computes, in the arithmetic of the training; asked before and after it has kernels.

    Attributes:
        model: A causal language model of transformers.
        device: Device on which to compute.
        precision: fp32, bf16 or fp16.
        strategy: Strategy of the training. Under ZeRO-3 all processes must call `run`, since the weights are sharded.
        lora: Whether adapters will be trained. In half precision, weights that a strategy trains are in that format
            (`uses_masters`, and ZeRO); otherwise there is autocast.
    """

    model: Any
    device: torch.device
    precision: str
    strategy: str = "vanilla"
    lora: bool = False
    _weights: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def run(self) -> dict[float, list[torch.Tensor]]:
        """Return the outputs of the first layers, and the gradients of their inputs and weights, by tolerance.

        They are computed in the arithmetic of the training, and before that in fp32, where small faults show, unless
        the weights are in half precision. Random states, gradients and the mode of the model are left unchanged.
        """
        base, mode, half = self.model.base_model, self.model.training, _FORMATS.get(self.precision)
        self.model.eval()
        found = {}
        try:
            with _first_layers(base), torch.enable_grad():
                weights = self._weights = self._weights or self._copied_weights(base)
                if self._dtype == torch.float32:
                    found[FP32_TOLERANCE] = self._results(base, weights, None)
                if half is not None and self._trains_under_autocast:
                    found[HALF_TOLERANCE] = self._results(base, weights, half)
                elif half is not None:
                    weights = {name: _in_format(one, half) for name, one in weights.items()}
                    found[HALF_TOLERANCE] = self._results(base, weights, None)
        finally:
            self.model.train(mode)
        return found

    @property
    def _trains_under_autocast(self) -> bool:
        return self.strategy == "vanilla" and not uses_masters(self.strategy, self.precision, lora=self.lora)

    @property
    def _dtype(self) -> torch.dtype:
        return next(one.dtype for one in self.model.parameters() if one.is_floating_point())

    def _copied_weights(self, base: Any) -> dict[str, torch.Tensor]:
        """Return copies of the weights and buffers of the layers on the device; 4-bit weights stay where they are."""
        embedding = base.get_input_embeddings()
        unused = set(embedding.parameters()) if embedding is not None else set()
        named = {name: one for name, one in base.named_parameters() if one.is_floating_point() and one not in unused}
        with _gathered(list(named.values()) if self.strategy == "zero3" else []):
            found = {name: one.detach().to(self.device, copy=True) for name, one in named.items()}
        for one in found.values():
            one.requires_grad_()
        return found | {name: one.detach().to(self.device) for name, one in base.named_buffers()}

    def _results(self, base: Any, weights: dict[str, torch.Tensor], autocast: torch.dtype | None) -> list[torch.Tensor]:
        learned = [one for one in weights.values() if one.requires_grad]
        arguments = self._arguments(base, learned[0].dtype)
        with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
            output = torch.func.functional_call(base, weights, kwargs=arguments)[0]
        leaves, direction = [arguments["inputs_embeds"], *learned], _numbers(output.shape, output, seed=1)
        gradients = torch.autograd.grad(output, leaves, direction, allow_unused=True, materialize_grads=True)
        return [output.detach(), *gradients]

    def _arguments(self, base: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of a forward on a row of two conversations, with hidden states in place of ids."""
        call = ModelCall.of(self.model)
        lengths = _LENGTHS if call.packed else _LENGTHS[:1]
        row = pack_sequences([(np.arange(length), np.arange(length)) for length in lengths]).to(self.device)
        arguments = call.arguments(row)
        del arguments["input_ids"]
        arguments.pop("logits_to_keep", None)
        size = base.get_input_embeddings().embedding_dim
        like = torch.empty(0, dtype=dtype, device=self.device)
        return arguments | {"inputs_embeds": _numbers((1, sum(lengths), size), like, seed=0).requires_grad_()}


def compare(expected: dict[float, list[torch.Tensor]], found: dict[float, list[torch.Tensor]]) -> tuple[float, float]:
    """Return the largest relative difference of two tensors that stand for the same, and the tolerance of it.

    Of the arithmetics it is the one that comes nearest to its tolerance, or exceeds it most. The difference is
    infinite where a number is not finite.
    """
    sizes = [(_difference(expected[tolerance], found[tolerance]), tolerance) for tolerance in expected]
    return max(sizes, key=lambda size: size[0] / size[1])


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    strengths = [_root_mean_square(one) for one in expected]
    weakest = _FAINT * max(strengths[1:])
    sizes = [
        _root_mean_square(one.float() - other.float()) / max(strength, weakest, 1e-30)
        for one, other, strength in zip(found, expected, strengths, strict=True)
    ]
    return max(sizes) if all(map(math.isfinite, sizes)) else math.inf


def _in_format(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _first_layers(base: Any) -> Iterator[None]:
    """Let a model have only as many of its first layers as show every kind of layer that it has."""
    count = base.config.get_text_config().num_hidden_layers
    lists = [(name, one) for name, one in base.named_children() if isinstance(one, nn.ModuleList) and len(one) == count]
    if len(lists) != 1:  # another structure: all layers
        yield
        return
    [(name, layers)] = lists
    attention = getattr(base.config.get_text_config(), "layer_types", None) or [None] * count
    kinds = [
        (kind, tuple(type(part).__name__ for part in layer.modules()))
        for kind, layer in zip(attention, layers, strict=True)
    ]
    setattr(base, name, nn.ModuleList(list(layers)[: max(map(kinds.index, kinds)) + 1]))
    try:
        yield
    finally:
        setattr(base, name, layers)


@contextlib.contextmanager
def _gathered(parameters: list[Any]) -> Iterator[None]:
    if not parameters:
        yield
        return
    from minisft.training.zero import gathered

    with gathered(parameters):
        yield


def _numbers(shape: Any, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Return normal numbers that every device and process draws alike."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(like.device, like.dtype)


def _root_mean_square(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
