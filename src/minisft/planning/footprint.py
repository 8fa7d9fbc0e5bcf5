"""A model as planning needs it, and the configuration that it is counted from (`planning.counting`)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.models import load_config

MEND = "complete the model's config.json, or give another model"
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Footprint:
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
        backward_flops: likewise.
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
        raise UserError(path, f"the configuration cannot be read ({first_line(error)})", MEND) from None
    config = load_config(folder, trust_remote_code)
    _require_fields(path, raw, config)
    return config


def _require_fields(path: Path, raw: dict[str, Any], config: Any) -> None:
    """Refuse to plan with a default of transformers where the model's own figure is missing."""
    text = config.get_text_config()
    section = next((part for part in raw.values() if isinstance(part, dict) and "hidden_size" in part), raw)
    for name in _NEEDED:
        if not ({name, text.attribute_map.get(name, name)} & ({*raw} | {*section})):
            raise UserError(path, f"the field {name} is missing", MEND)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
