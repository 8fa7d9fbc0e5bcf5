"""Memory and operations of a model's forward and backward, counted on the meta device from its configuration.

The model's own code runs on tensors that have shapes and no data. Torch's saved-tensor hooks add up what autograd
would keep for the backward, and torch's FlopCounterMode counts the operations. This counts every architecture that
transformers can build, with peft's LoRA layers. For a GPT with dropout the result has the terms of Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), equation 2, without the
attention scores, which flash attention does not keep (Dao 2023, arXiv 2307.08691).
"""

import contextlib
import copy
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from minisft.errors import UserError
from minisft.models import build_on_meta_device, load_config
from minisft.planning.liger_memory import apply_stand_ins
from minisft.recipe import LoraRecipe
from minisft.text import first_line
from minisft.training.loss import output_layer, returns_raw_logits

FIX = "complete the model's config.json, or give another model"
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelCost:
    """The size of a model, and what its forward and backward cost. A shared tensor is counted once.

    Attributes:
        parameters: Number of parameters.
        trainable: Number of parameters that are trained.
        largest: Number of elements of the largest trainable tensor.
        tied: True where the embedding is the output layer too.
        layers: Number of decoder layers.
        hidden_size: Width of the residual stream.
        vocabulary: Number of rows of the output layer.
        activation_bytes: Bytes that are kept for the backward, for each token of a row.
        constant_bytes: Bytes that are kept for the backward independently of the tokens (autocast's weight copies).
        stream_bytes: Bytes of the residual stream for each token, which gradient checkpointing keeps of a layer.
        forward_flops: Operations of the forward for each token, without attention scores and output layer.
        backward_flops: The same for the backward.
        attention_width: Number of heads times head size, summed over layers.
        all_logits: True where all logits of a row exist at once, because the model changes them or adds a bias.
        adapted_width: Elements of the outputs of all layers that have adapters, for each token.
        cache_width: Elements of keys and values for each token, summed over layers.
    """

    parameters: int
    trainable: int
    largest: int
    tied: bool
    layers: int
    hidden_size: int
    vocabulary: int
    activation_bytes: float
    constant_bytes: float
    stream_bytes: float
    forward_flops: float
    backward_flops: float
    attention_width: int
    all_logits: bool = False
    adapted_width: int = 0
    cache_width: int = 0

    def kept_bytes(self, checkpointing: bool) -> float:
        """Return the largest number of bytes for each token that are alive during the backward.

        Checkpointing keeps the input of each layer and recomputes the rest, one layer at a time (Chen et al. 2016,
        arXiv 1604.06174).
        """
        if not checkpointing:
            return self.activation_bytes
        return self.layers * self.stream_bytes + self.activation_bytes / self.layers

    def step_flops(self, checkpointing: bool) -> float:
        """Return the operations for each token, forward and backward, without attention scores and output layer."""
        recomputed = self.forward_flops if checkpointing else 0.0
        return self.forward_flops + self.backward_flops + recomputed

    def attention_flops(self, squares: float, checkpointing: bool) -> float:
        """Return the operations of causal attention over conversations whose squared lengths sum to `squares`.

        The forward has 2 products and the backward 5, each of 2 l^2 operations for a unit of width, half of which are
        masked (Dao 2023).
        """
        products = 7 + (2 if checkpointing else 0)
        return products * squares * self.attention_width

    def head_flops(self, supervised: float) -> float:
        """Return the operations of the output layer at `supervised` positions, forward and backward."""
        passes = 3 if self.parameters == self.trainable else 2
        return passes * 2 * self.hidden_size * self.vocabulary * supervised


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Read a model folder's configuration.

    Raises:
        UserError: The configuration is missing or damaged, or lacks a field.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(folder, "there is no config.json", "give a model folder with its config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(path, f"the configuration cannot be read ({first_line(error)})", FIX) from None
    config = load_config(folder, trust_remote_code)
    # Transformers fills a missing field with a default, which would give a plan for another model.
    text_config = config.get_text_config()
    text_section = next((part for part in raw.values() if isinstance(part, dict) and "hidden_size" in part), raw)
    for name in _NEEDED:
        if not ({name, text_config.attribute_map.get(name, name)} & ({*raw} | {*text_section})):
            raise UserError(path, f"the field {name} is missing", FIX)
    return config


# Precision of the tensors: all fp32, all half precision (DeepSpeed), or fp32 with half-precision products (autocast).
PrecisionMode = Literal["fp32", "half", "autocast"]

# Tokens of the row that is counted. A prime: a saved tensor whose size is a multiple of it depends on the tokens.
_TOKENS = 127
_ATTENTION = "minisft_plan"
_SHALLOW = (2, 3)  # numbers of layers that are counted of a deep model whose layers are identical


def count_cost(config: Any, mode: PrecisionMode, lora: LoraRecipe | None = None, *, liger: bool = False) -> ModelCost:
    """Build a model on the meta device, and count the memory and the operations of a row.

    Args:
        config: Configuration of the model.
        mode: Precision of the tensors.
        lora: The adapters; None trains all weights.
        liger: True where norms and MLPs have the kernels of Liger, which keep less for the backward.

    Raises:
        UserError: The configuration does not describe a model that transformers can build.
    """
    register_attention()
    try:
        return _count_shallow(config, mode, lora, liger) or _count(config, mode, lora, liger)
    except UserError:
        raise
    except Exception as error:  # a field that contradicts the others may raise anything in a model's code
        where = getattr(config, "name_or_path", "") or "config.json"
        raise UserError(where, f"the model cannot be built ({first_line(error)})", FIX) from None


class ModelCosts:
    """The costs of one model in each precision and with each LoRA setting, each counted when it is first needed.

    Args:
        config: Configuration of the model.
        liger: True where the model will have the kernels of Liger.
    """

    def __init__(self, config: Any, *, liger: bool = False) -> None:
        self.config = config
        self.liger = liger
        self._counted: dict[str, ModelCost] = {}

    def of(self, mode: PrecisionMode, lora: LoraRecipe | None = None) -> ModelCost:
        key = f"{mode} {lora}"
        if key not in self._counted:
            self._counted[key] = count_cost(self.config, mode, lora, liger=self.liger)
        return self._counted[key]


def _build(config: Any, mode: PrecisionMode, lora: LoraRecipe | None, liger: bool) -> Any:
    from minisft.training.lora import add_lora

    halved = mode == "half" or (mode == "autocast" and lora is not None)  # frozen weights are in half precision
    dtype = torch.bfloat16 if halved else torch.float32
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = build_on_meta_device(config, attn_implementation=_ATTENTION, dtype=dtype)
        if liger:
            apply_stand_ins(model)
        if lora is not None:
            model = add_lora(model, lora, base_name="", seed=0)
    return model.to(torch.bfloat16) if mode == "half" else model


def _count_shallow(config: Any, mode: PrecisionMode, lora: LoraRecipe | None, liger: bool) -> ModelCost | None:
    """Count two models of a few layers and extrapolate linearly, which is exact where all layers are identical.

    Returns:
        None where the model is not deeper, or where the extrapolated number of parameters is wrong.
    """
    layers = config.get_text_config().num_hidden_layers
    if layers <= 2 * max(_SHALLOW):
        return None
    low, high = (_count(shortened(config, depth), mode, lora, liger) for depth in _SHALLOW)
    factor = (layers - _SHALLOW[0]) / (_SHALLOW[1] - _SHALLOW[0])

    def at_depth(name: str) -> Any:
        start, end = getattr(low, name), getattr(high, name)
        return type(start)(start + factor * (end - start))

    weights = list(_build(config, mode, lora, liger).parameters())
    names = ("parameters", "trainable", "activation_bytes", "constant_bytes", "forward_flops", "backward_flops",
             "attention_width", "adapted_width", "cache_width")  # fmt: skip
    cost = replace(low, layers=layers, **{name: at_depth(name) for name in names})
    actual = _elements(weights), _elements(weight for weight in weights if weight.requires_grad)
    return cost if actual == (cost.parameters, cost.trainable) else None


def shortened(config: Any, layers: int) -> Any:
    """Return a copy of a model's configuration with its first `layers` layers."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    if getattr(text_config, "layer_types", None):
        text_config.__dict__["layer_types"] = list(text_config.layer_types[:layers])
    text_config.num_hidden_layers = layers
    return config


def _elements(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _count(config: Any, mode: PrecisionMode, lora: LoraRecipe | None, liger: bool) -> ModelCost:
    """Count one row's forward and backward of the complete model."""
    model = _build(config, mode, lora, liger)
    parameters = list(model.parameters())
    trained = [weight for weight in parameters if weight.requires_grad]
    head = model.get_output_embeddings()
    # 1. Forward and backward of the layers, without the output layer.
    saved = _SavedTensors(parameters)
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    body = getattr(model, "get_base_model", lambda: model)().base_model.train()
    autocast = _HalfProducts() if mode == "autocast" else contextlib.nullcontext()
    _Attention.width = _Attention.cache_width = 0
    with autocast, FlopCounterMode(display=False) as forward, saved.hooks():
        hidden = body(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    attention_width, cache_width = _Attention.width, _Attention.cache_width  # before the next forward adds to them
    # 2. Whether the loss can compute the logits in chunks: only where the model returns the output layer's own values.
    layer, one_token = output_layer(model), torch.zeros((1, 1), dtype=torch.long, device="meta")
    with torch.no_grad():
        in_chunks = layer is not None and returns_raw_logits(
            layer, lambda: model(input_ids=one_token, position_ids=one_token, use_cache=False).logits
        )
    return ModelCost(
        parameters=_elements(parameters),
        trainable=_elements(trained),
        largest=max(weight.numel() for weight in trained),
        tied=head.weight is model.get_input_embeddings().weight,
        layers=config.get_text_config().num_hidden_layers,
        hidden_size=hidden.shape[-1],
        vocabulary=head.weight.shape[0],
        activation_bytes=saved.per_token() / _TOKENS,
        constant_bytes=saved.constant(),
        stream_bytes=hidden.shape[-1] * hidden.element_size(),
        forward_flops=forward.get_total_flops() / _TOKENS,
        backward_flops=backward.get_total_flops() / _TOKENS,
        attention_width=attention_width,
        all_logits=not in_chunks,
        adapted_width=sum(module.out_features for module in model.modules() if hasattr(module, "lora_A")),
        cache_width=cache_width,
    )


@dataclass
class _SavedTensors:
    """The storages that autograd saves beside the model's own weights.

    Attributes:
        weights: The model's parameters, which are not counted.
        storages: Each saved storage and the bytes of its elements, by the storage's address.
    """

    weights: list[torch.Tensor]
    storages: dict[int, tuple[Any, int]] = field(default_factory=dict)

    def hooks(self) -> Any:
        """Return a context manager that notes what autograd saves."""
        of_weights = {weight.untyped_storage()._cdata for weight in self.weights}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in of_weights:
                self.storages[storage._cdata] = (storage, tensor.element_size())
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def per_token(self) -> int:
        """Return the bytes of the storages whose size depends on the tokens."""
        return sum(s.nbytes() for s, size in self.storages.values() if s.nbytes() // size % _TOKENS == 0)

    def constant(self) -> int:
        """Return the bytes of the other storages."""
        return sum(s.nbytes() for s, size in self.storages.values() if s.nbytes() // size % _TOKENS)


class _HalfProducts(TorchFunctionMode):
    """Products in half precision, as under torch.autocast, which has no effect on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            args = tuple(self._as_half(argument) for argument in args)
        return func(*args, **(kwargs or {}))

    def _as_half(self, argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor) or argument.dtype == torch.bfloat16:
            return argument
        if not isinstance(argument, torch.nn.Parameter):
            return argument.to(torch.bfloat16)
        if id(argument) not in self.casts:  # autocast casts a weight once for a forward
            self.casts[id(argument)] = argument.to(torch.bfloat16)
        return self.casts[id(argument)]


class _Attention(torch.autograd.Function):
    """Attention that saves what flash attention saves: queries, keys, values, output, and one number for each query."""

    width = cache_width = 0

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        _Attention.width += query.shape[1] * query.shape[3]
        _Attention.cache_width += sum(one.shape[1] * one.shape[3] for one in (key, value))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> tuple[Any, None]:
    """Stand in for `training.attention`, which copies the conversations' outputs into one tensor, end to end."""
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} attention heads cannot share {key.shape[1]} key-value heads")
    if query.dtype != value.dtype:  # autocast computes attention in half precision, as it does products
        query, key = query.to(value.dtype), key.to(value.dtype)
    return torch.cat([_Attention.apply(query, key, value)], 2).transpose(1, 2), None


def register_attention() -> None:
    """Register the attention that is counted under a name that transformers can load a model with."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)
