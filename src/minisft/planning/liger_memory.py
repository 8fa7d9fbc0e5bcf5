"""The memory of Liger's kernels: stand-ins that keep for the backward what the kernels keep, and compute nothing.

Triton's kernels need numbers, and have none on the meta device, where the plan counts, and on the fake tensors of a dry
run. There these stand-ins take their place. What the kernels keep is what `save_for_backward` gets in liger-kernel
0.8.5: `ops/rms_norm.py` keeps its input and a number for each row, where the model's own code keeps the input in fp32
and the normalised input; `ops/swiglu.py` and `ops/geglu.py` keep gate and up, where the model's own code keeps the
activation of the gate too. The rotary embedding keeps sines and cosines either way.
"""

from types import MethodType
from typing import Any

import torch

from minisft.training.kernels import is_gated_mlp, norms

# Models whose stand-ins keep what their kernels keep: the tests compare them with liger-kernel itself. The plan counts
# other models that Liger knows with their own code, which keeps more.
MODEL_TYPES = frozenset({
    "gemma", "gemma2", "gemma3_text", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3", "smollm3",
})  # fmt: skip


def apply_stand_ins(model: Any) -> tuple[str, ...]:
    """Give the norms and MLPs of a model the stand-ins; return the names of the classes that got them.

    Args:
        model: A causal language model of transformers, before adapters are added; it is left unchanged if its type is
            not one of `MODEL_TYPES`.
    """
    if model.config.model_type not in MODEL_TYPES:
        return ()
    found = set()
    for module in norms(model):
        module.forward = MethodType(_norm, module)
        found.add(type(module).__name__)
    for module in model.modules():
        if is_gated_mlp(module):
            module.forward = MethodType(_gated_mlp, module)
        elif type(module).__name__ == "Phi3MLP":  # gate and up are one product
            module.forward = MethodType(_phi3_mlp, module)
        else:
            continue
        found.add(type(module).__name__)
    return tuple(sorted(found))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, up = ctx.saved_tensors  # the kernel writes the gradients into them
        return gate, up


def _norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(hidden, self.weight)  # type: ignore[no-any-return]


def _gated_mlp(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return self.down_proj(_GatedProduct.apply(self.gate_proj(hidden), self.up_proj(hidden)))  # type: ignore[no-any-return]


def _phi3_mlp(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
    return self.down_proj(_GatedProduct.apply(gate, up))  # type: ignore[no-any-return]
