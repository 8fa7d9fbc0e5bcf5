"""Memory and operations of a model's forward and backward, counted on the meta device from its configuration.

The model's own code runs on tensors that have shapes and no data; what autograd would keep for the backward is
added up by torch's saved-tensor hooks, operations by torch's FlopCounterMode. So any architecture that transformers
knows is counted as it is, LoRA by peft included. For a GPT with dropout this gives the terms of Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), equation 2, without the
attention scores, which flash attention does not keep (Dao 2023, arXiv 2307.08691).
"""

import contextlib
import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from minisft.errors import UserError
from minisft.models import build_on_meta_device, load_config
from minisft.recipe import LoraRecipe
from minisft.text import first_line
from minisft.training.loss import output_layer, returns_raw_logits

FIX = "complete the model's config.json, or give another model"
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelCost:
    """A model as planning needs it. Sizes in elements are of the whole model, a shared one counted once.

    Attributes:
        parameters: elements.
        trainable: elements that are trained.
        largest: elements of the largest trainable tensor.
        tied: the embedding is the output layer too.
        layers: decoder layers.
        hidden_size: width of the residual stream.
        vocabulary: of the output layer.
        activation_bytes: kept for the backward, for each token of a row.
        constant_bytes: kept for the backward, whatever the tokens (autocast's copies of the weights).
        stream_bytes: of the residual stream, for each token: what gradient checkpointing keeps of a layer.
        forward_flops: for each token, without attention scores and output layer.
        backward_flops: The same for the backward.
        attention_width: heads times head size, summed over layers.
        all_logits: those of a row are there at once, since the model changes them, or has a bias there.
        adapted_width: elements of the outputs of all layers that have adapters, for each token.
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

    def kept_bytes(self, checkpointing: bool) -> float:
        """Bytes for each token that are alive when the backward begins, or at most later, with checkpointing.

        Checkpointing keeps a layer's input and, one layer at a time, computes the rest anew (Chen et al. 2016,
        arXiv 1604.06174).
        """
        if not checkpointing:
            return self.activation_bytes
        return self.layers * self.stream_bytes + self.activation_bytes / self.layers

    def step_flops(self, checkpointing: bool) -> float:
        """Operations for each token, forward and backward, without attention scores and output layer."""
        again = self.forward_flops if checkpointing else 0.0
        return self.forward_flops + self.backward_flops + again

    def attention_flops(self, squares: float, checkpointing: bool) -> float:
        """Operations of causal attention over conversations whose squared lengths sum to `squares`.

        Forward 2 products, backward 5, each of 2 l^2 operations for a unit of width, half of them masked (Dao 2023).
        """
        products = 7 + (2 if checkpointing else 0)
        return products * squares * self.attention_width

    def head_flops(self, supervised: float) -> float:
        """Operations of the output layer at `supervised` positions: forward, and backward to inputs and weights."""
        passes = 3 if self.parameters == self.trainable else 2
        return passes * 2 * self.hidden_size * self.vocabulary * supervised


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Read a model folder's configuration.

    Raises:
        UserError: there is none, or it lacks a field.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(folder, "there is no config.json", "give a model folder with its config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(path, f"the configuration cannot be read ({first_line(error)})", FIX) from None
    config = load_config(folder, trust_remote_code)
    _require_fields(path, raw, config)
    return config


def _require_fields(path: Path, raw: dict[str, Any], config: Any) -> None:
    """Refuse to plan with a default of transformers where the model's own figure is missing."""
    text = config.get_text_config()
    section = next((part for part in raw.values() if isinstance(part, dict) and "hidden_size" in part), raw)
    for name in _NEEDED:
        if not ({name, text.attribute_map.get(name, name)} & ({*raw} | {*section})):
            raise UserError(path, f"the field {name} is missing", FIX)


# How numbers are kept: all in fp32, all in half precision (DeepSpeed), or fp32 with products in half (autocast).
PrecisionMode = Literal["fp32", "half", "autocast"]

_TOKENS = 127  # a prime: what a saved tensor's size says of its dependence on the tokens is no accident
_ATTENTION = "minisft_plan"
_SHALLOW = (2, 3)  # layers that are counted of a deep model whose layers are alike


def count_cost(config: Any, mode: PrecisionMode, lora: LoraRecipe | None = None) -> ModelCost:
    """Lay a model out on the meta device and count what a row of it takes.

    Raises:
        UserError: the configuration does not describe a model that transformers can build.
    """
    register_attention()
    try:
        return _count_shallow(config, mode, lora) or _count(config, mode, lora)
    except UserError:
        raise
    except Exception as error:  # a figure that does not fit the others shows as anything
        where = getattr(config, "name_or_path", "") or "config.json"
        raise UserError(where, f"the model cannot be laid out ({first_line(error)})", FIX) from None


class ModelCosts:
    """The footprints of one model, each counted when it is first asked for."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._counted: dict[str, ModelCost] = {}

    def of(self, mode: PrecisionMode, lora: LoraRecipe | None = None) -> ModelCost:
        key = f"{mode} {lora}"
        if key not in self._counted:
            self._counted[key] = count_cost(self.config, mode, lora)
        return self._counted[key]


def _build(config: Any, mode: PrecisionMode, lora: LoraRecipe | None) -> Any:
    from minisft.training.lora import add_lora

    halved = mode == "half" or (mode == "autocast" and lora is not None)  # frozen weights are in half
    dtype = torch.bfloat16 if halved else torch.float32
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = build_on_meta_device(config, attn_implementation=_ATTENTION, dtype=dtype)
        if lora is not None:
            model = add_lora(model, lora, base_name="", seed=0)
    return model.to(torch.bfloat16) if mode == "half" else model


def _count_shallow(config: Any, mode: PrecisionMode, lora: LoraRecipe | None) -> ModelCost | None:
    """Count two short stacks of layers and go on in a straight line, which is exact where all layers are alike.

    Returns:
        None where the model is no deeper, or where the line misses the parameters that the whole model has.
    """
    layers = config.get_text_config().num_hidden_layers
    if layers <= 2 * max(_SHALLOW):
        return None
    low, high = (_count(shortened(config, depth), mode, lora) for depth in _SHALLOW)
    reach = (layers - _SHALLOW[0]) / (_SHALLOW[1] - _SHALLOW[0])

    def at_depth(name: str) -> Any:
        start, end = getattr(low, name), getattr(high, name)
        return type(start)(start + reach * (end - start))

    whole = list(_build(config, mode, lora).parameters())
    names = ("parameters", "trainable", "activation_bytes", "constant_bytes", "forward_flops", "backward_flops",
             "attention_width", "adapted_width")  # fmt: skip
    cost = replace(low, layers=layers, **{name: at_depth(name) for name in names})
    counted = _elements(whole), _elements(weight for weight in whole if weight.requires_grad)
    return cost if counted == (cost.parameters, cost.trainable) else None


def shortened(config: Any, layers: int) -> Any:
    """Return a copy of a model's configuration with so many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.__dict__["layer_types"] = list(text.layer_types[:layers])
    text.num_hidden_layers = layers
    return config


def _elements(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _count(config: Any, mode: PrecisionMode, lora: LoraRecipe | None) -> ModelCost:
    model = _build(config, mode, lora)
    parameters = list(model.parameters())
    trained = [weight for weight in parameters if weight.requires_grad]
    head = model.get_output_embeddings()
    saved = _Saved(parameters)
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    body = getattr(model, "get_base_model", lambda: model)().base_model.train()
    _Attention.width = 0
    with _autocast(mode), FlopCounterMode(display=False) as forward, saved.hooks():
        hidden = body(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
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
        attention_width=_Attention.width,
        all_logits=not _has_plain_logits(model),
        adapted_width=sum(module.out_features for module in model.modules() if hasattr(module, "lora_A")),
    )


def _has_plain_logits(model: Any) -> bool:
    """Say whether `training.loss` can take a chunk of the logits at a time."""
    layer = output_layer(model)
    if layer is None:
        return False
    ids = torch.zeros((1, 1), dtype=torch.long, device="meta")
    with torch.no_grad():
        return returns_raw_logits(layer, lambda: model(input_ids=ids, position_ids=ids, use_cache=False).logits)


@dataclass
class _Saved:
    """The storages that autograd keeps beside the model's own weights."""

    weights: list[torch.Tensor]
    found: dict[int, tuple[Any, int]] = field(default_factory=dict)

    def hooks(self) -> Any:
        own = {weight.untyped_storage()._cdata for weight in self.weights}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                self.found[storage._cdata] = (storage, tensor.element_size())
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def per_token(self) -> int:
        return sum(s.nbytes() for s, size in self.found.values() if s.nbytes() // size % _TOKENS == 0)

    def constant(self) -> int:
        return sum(s.nbytes() for s, size in self.found.values() if s.nbytes() // size % _TOKENS)


@contextlib.contextmanager
def _autocast(mode: PrecisionMode) -> Iterator[None]:
    with _HalfProducts() if mode == "autocast" else contextlib.nullcontext():
        yield


class _HalfProducts(TorchFunctionMode):
    """What torch.autocast does to products, which it does not do on the meta device: half precision, casts kept."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            args = tuple(self._halved(item) for item in args)
        return func(*args, **(kwargs or {}))

    def _halved(self, item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or item.dtype == torch.bfloat16:
            return item
        if not isinstance(item, torch.nn.Parameter):
            return item.to(torch.bfloat16)
        if id(item) not in self.casts:  # autocast casts a weight once for a forward
            self.casts[id(item)] = item.to(torch.bfloat16)
        return self.casts[id(item)]


class _Attention(torch.autograd.Function):
    """Attention that keeps what flash attention keeps: queries, keys, values, output, and a number a query."""

    width = 0

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        _Attention.width += query.shape[1] * query.shape[3]
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> tuple[Any, None]:
    """Take the place of `training.attention`, which lays the conversations' outputs end to end in a copy."""
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} attention heads cannot share {key.shape[1]} key-value heads")
    if query.dtype != value.dtype:  # autocast takes attention for a product
        query, key = query.to(value.dtype), key.to(value.dtype)
    return torch.cat([_Attention.apply(query, key, value)], 2).transpose(1, 2), None


def register_attention() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)
