"""Liger's kernels on a CPU, by Triton's interpreter, against plain torch: `python -m tests.interpreted_kernels`.

It prints the largest relative difference of each kernel as JSON, of its outputs and of its gradients. With words, it runs
that `minisft` command. It is a process of its own, since Triton decides when it is imported whether it interprets.

The interpreter lacks two things that Liger's kernels use: methods of scalars that are floats, and the functions of
CUDA's libdevice. Both are played here, by fp32 scalars as the compiler makes them, and by Triton's own functions.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch.nn.functional import gelu, rms_norm, silu
from triton.runtime import interpreter


def complete_interpreter() -> None:
    """Give the interpreter what it lacks; call it before a kernel runs."""
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm

    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    interpreter._implicit_cvt = converted
    # Looked up when they are called: the interpreter replaces the functions of `tl` while a kernel runs.
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    liger_kernel.ops.geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def relative_differences(kernel: Callable[..., Any], plain: Callable[..., Any], *inputs: torch.Tensor) -> list[float]:
    """Return the differences of outputs, then those of the gradients of the inputs."""
    results = []
    for function in (kernel, plain):
        leaves = [one.clone().requires_grad_() for one in inputs]
        outputs = function(*(one * 1 for one in leaves))  # kernels write into what they are given
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weighted = sum((one * torch.linspace(-1, 1, one.numel()).reshape(one.shape)).sum() for one in outputs)
        values = [one.detach().clone() for one in outputs]
        results.append([*values, *torch.autograd.grad(weighted, leaves)])
    return [float((one - other).norm() / other.norm()) for one, other in zip(*results, strict=True)]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def plain_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rotate pairs of elements as complex numbers (Su et al. 2021, arXiv 2104.09864), halves as transformers has them."""
    half = q.shape[-1] // 2
    turn = torch.complex(cos[:, None, :, :half], sin[:, None, :, :half])
    turned = [torch.complex(one[..., :half], one[..., half:]) * turn for one in (q, k)]
    return tuple(torch.cat([one.real, one.imag], -1) for one in turned)


def main() -> None:
    from minisft.training import kernels

    logging.disable(logging.WARNING)  # Liger names the packages of other devices that are not installed
    complete_interpreter()
    kernels.find_obstacle = lambda *words: None  # the interpreter needs no GPU
    if sys.argv[1:]:
        from minisft.cli import main

        sys.exit(main(sys.argv[1:]))
    print(json.dumps(_differences_of_kernels() | _differences_of_models() | {"kept": _kept_and_counted()}))


def _differences_of_kernels() -> dict[str, Any]:
    from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    angles = torch.arange(11)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    cos, sin = (torch.cat([one, one], -1)[None] for one in (angles.cos(), angles.sin()))
    hidden, weight, gate, up = numbers(7, 48), 1 + 0.1 * numbers(48), numbers(7, 72), 3 * numbers(72, 7).T.contiguous()
    q, k = numbers(1, 4, 11, 8), numbers(1, 2, 11, 8)
    return {
        "rms_norm of Llama": relative_differences(
            lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", True, None),
            lambda x, w: rms_norm(x, (48,), w, 1e-6),
            hidden, weight,
        ),
        "rms_norm of Gemma": relative_differences(
            lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 1.0, "gemma", False, None),
            lambda x, w: rms_norm(x, (48,), 1 + w, 1e-6),
            hidden, weight,
        ),
        "rotary": relative_differences(
            lambda q, k: LigerRopeFunction.apply(q, k, cos, sin), lambda q, k: plain_rotary(q, k, cos, sin), q, k
        ),
        "swiglu": relative_differences(
            lambda a, b: LigerSiLUMulFunction.apply(a, b, 1.0, 1.0), lambda a, b: silu(a) * b, gate, up
        ),
        "geglu": relative_differences(
            lambda a, b: LigerGELUMulFunction.apply(a, b), lambda a, b: gelu(a, approximate="tanh") * b, gate, up
        ),
    }  # fmt: skip


def _differences_of_models() -> dict[str, Any]:
    """Return the difference of each model with the kernels, or the reason why it does not get them."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, Qwen3Config

    from minisft.errors import UserError
    from minisft.recipe import TrainingRecipe
    from minisft.training import attention, kernels

    attention.register()
    models = {
        "Llama": LlamaConfig(**_SIZES),
        "Llama with another activation": LlamaConfig(**_SIZES, hidden_act="relu"),
        "Qwen3": Qwen3Config(**_SIZES, head_dim=8),
        "Gemma2": Gemma2Config(**_SIZES, head_dim=8),
        "Phi3": Phi3Config(**_SIZES, pad_token_id=0),
    }
    found: dict[str, Any] = {}
    for name, config in models.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)
        training = TrainingRecipe(kernels="liger", precision="fp32")
        try:
            found[name] = kernels.use_kernels(model, training, torch.device("cpu")).as_dict()
        except UserError as error:
            found[name] = error.problem
    return found


def _kept_and_counted() -> dict[str, tuple[float, float]]:
    """Return the bytes for each token that a model with the kernels keeps for the backward, and what the plan counts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from minisft.planning.liger_memory import MODEL_TYPES
    from minisft.planning.model_cost import count_cost
    from minisft.training import attention
    from minisft.training.kernels import apply_liger

    found = {}
    for kind in sorted(MODEL_TYPES):
        # A soft cap would keep the attention scores, which are not the kernels'.
        config = AutoConfig.for_model(kind, **_SIZES, head_dim=8, pad_token_id=0, attn_logit_softcapping=None)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.PADDING_FREE)
        apply_liger(model)
        own = {one.untyped_storage().data_ptr() for one in model.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, Any] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        tokens = 96
        ids = torch.arange(tokens)[None] % 50
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train().base_model(
                input_ids=ids, position_ids=torch.arange(tokens)[None], use_cache=False, conversation_lengths=(tokens,)
            )
        counted = count_cost(config, "fp32", liger=True).activation_bytes
        found[kind] = (sum(size for size, _ in kept.values()) / tokens, counted)
    return found


_SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip

if __name__ == "__main__":
    main()
