"""Key-value cache of the decoding loop: layers that grow in place, and the cache that a chat keeps between turns."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Key-value buffers grow by this many positions at a time.
CACHE_BLOCK = 64


@dataclass
class PromptCache:
    """Keys and values of the last prompt and answer: the next turn of a chat computes its new part only."""

    ids: list[int]
    cache: DynamicCache | None = None

    def reuse(self, prompt: list[int]) -> int:
        """Crop the cache to the prefix that it shares with `prompt`, and return the length of that prefix.

        The prefix is at least one id shorter than `prompt`: the model needs an input to give logits.
        """
        shared = min(common_prefix(self.ids, prompt), len(prompt) - 1)
        surplus = len(self.ids) - shared
        if shared == 0:
            self.cache = None
        elif self.cache is not None and surplus > 0:
            try:
                self.cache.crop(-surplus)
            except (RuntimeError, ValueError, AttributeError, NotImplementedError):
                self.cache = None  # a sliding window, say, no longer has the earlier positions
        if self.cache is None:
            shared = 0
        self.ids = prompt[:shared]
        return shared


class PreallocatedLayer(DynamicLayer):
    """A layer of keys and values [rows, heads, positions, width] that grows in place, one block at a time.

    transformers' `DynamicLayer` copies all keys and values for every new token.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self._buffers: list[Tensor] = []
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < end:
            self._buffers = [_preallocated(self.keys, end), _preallocated(self.values, end)]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = []

    @classmethod
    def holding(cls, keys: Tensor | None, values: Tensor | None, rows: int) -> "PreallocatedLayer":
        """Return a layer whose rows all start with the keys and values [1, heads, positions, width], if given."""
        layer = cls()
        if keys is not None and values is not None:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (states.expand(rows, -1, -1, -1) for states in (keys, values))
            layer._buffers = []
        return layer

    def take(self, keys: list[Tensor], values: list[Tensor], width: int) -> None:
        """Take the rows of several layers, each right-aligned in `width` positions."""
        self.lazy_initialization(keys[0], values[0])
        self._buffers = []
        for parts in (keys, values):
            rows = sum(len(part) for part in parts)
            _, heads, _, size = parts[0].shape
            # zeros, not empty: attention multiplies masked values by 0, and 0 times NaN is NaN
            buffer = parts[0].new_zeros(rows, heads, width + CACHE_BLOCK, size)
            start = 0
            for part in parts:
                buffer[start : start + len(part), :, width - part.shape[-2] : width] = part
                start += len(part)
            self._buffers.append(buffer)
        self.keys, self.values = (buffer[..., :width, :] for buffer in self._buffers)


def _preallocated(states: Tensor, positions: int) -> Tensor:
    """Return a buffer that starts with `states` and has room for `positions` and one more block."""
    rows, heads, length, width = states.shape
    buffer = states.new_empty(rows, heads, positions + CACHE_BLOCK, width)
    buffer[..., :length, :] = states
    return buffer


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for a model; layers of other kinds (sliding window, recurrent state) stay transformers'."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a cache of `rows` rows, each a copy of the one row of `cache`."""
    copy = DynamicCache()
    layers: list[Any] = cache.layers
    copy.layers = [PreallocatedLayer.holding(layer.keys, layer.values, rows) for layer in layers]
    return copy


def merged(caches: list[DynamicCache], width: int) -> DynamicCache:
    """Return caches of several widths as one cache of `width` positions, the shorter ones padded on the left."""
    together = DynamicCache()
    together.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = PreallocatedLayer()
        if layers[0].keys is not None:  # None where a layer shares the keys and values of another one
            layer.take([part.keys for part in layers], [part.values for part in layers], width)
        together.layers.append(layer)
        for part in layers:  # free them at once, so that only one layer is in memory twice
            part.keys = part.values = None
    return together


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep the given rows [rows] of every layer, on whatever device it is."""
    layers: list[Any] = cache.layers
    for layer in layers:
        keys = getattr(layer, "keys", None)
        layer.batch_select_indices(rows if keys is None else rows.to(keys.device))


def without_first_positions(cache: DynamicCache, count: int) -> None:
    """Drop the first `count` positions of all rows, which are padding in each; for preallocated layers only."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if count and layer.keys is not None:
            layer.keys, layer.values = layer.keys[..., count:, :], layer.values[..., count:, :]
            layer._buffers = []


def common_prefix(left: list[int], right: list[int]) -> int:
    """Return how many ids both lists begin with."""
    differs = (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differs, min(len(left), len(right)))
