"""Keys and values of the decoding loop: layers that grow in place, and the cache that a chat keeps between turns."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Key-value buffers grow by so many positions at a time.
CACHE_BLOCK = 64


@dataclass
class PromptCache:
    """Keys and values of the last prompt and answer: the next turn of a chat computes its new part only."""

    ids: list[int]
    cache: DynamicCache | None = None

    def reuse(self, prompt: list[int]) -> int:
        """Crops the cache to what `prompt` shares with it, at least one id less, and returns that length."""
        shared = min(common_prefix(self.ids, prompt), len(prompt) - 1)
        surplus = len(self.ids) - shared
        if self.cache is None or shared == 0 or (surplus > 0 and not _crop(self.cache, surplus)):
            self.cache, shared = None, 0
        self.ids = prompt[:shared]
        return shared


class PreallocatedLayer(DynamicLayer):
    """A layer of keys and values [rows, heads, positions, width] that grows in place, a block at a time.

    `DynamicLayer` copies everything for every new token.
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
        """A layer that starts with the keys and values [1, heads, positions, width], if any, in each of its rows."""
        layer = cls()
        if keys is not None and values is not None:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (states.expand(rows, -1, -1, -1) for states in (keys, values))
            layer._buffers = []
        return layer

    def take(self, keys: list[Tensor], values: list[Tensor], width: int) -> None:
        """Takes the rows of several layers, each right-aligned in `width` positions."""
        self.lazy_initialization(keys[0], values[0])
        self._buffers = [_aligned(states, width) for states in (keys, values)]
        self.keys, self.values = (buffer[..., :width, :] for buffer in self._buffers)


def _aligned(parts: list[Tensor], width: int) -> Tensor:
    """A buffer of all rows with room for a block more; what is not filled is zero, since the mask multiplies it."""
    rows = sum(len(part) for part in parts)
    _, heads, _, size = parts[0].shape
    buffer = parts[0].new_zeros(rows, heads, width + CACHE_BLOCK, size)
    for part, place in zip(parts, _starts(parts), strict=True):
        buffer[place : place + len(part), :, width - part.shape[-2] : width] = part
    return buffer


def _starts(parts: list[Tensor]) -> list[int]:
    ends = list(accumulate(len(part) for part in parts))
    return [0, *ends[:-1]]


def _preallocated(states: Tensor, positions: int) -> Tensor:
    """A buffer with room for `positions` and a block more, that starts with `states`."""
    rows, heads, length, width = states.shape
    buffer = states.new_empty(rows, heads, positions + CACHE_BLOCK, width)
    buffer[..., :length, :] = states
    return buffer


def new_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of a cache of one row, for `rows` rows."""
    copy = DynamicCache()
    layers: list[Any] = cache.layers
    copy.layers = [PreallocatedLayer.holding(layer.keys, layer.values, rows) for layer in layers]
    return copy


def merged(caches: list[DynamicCache], width: int) -> DynamicCache:
    """Caches of several widths as one of `width` positions, the shorter ones padded on the left."""
    together = DynamicCache()
    together.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = PreallocatedLayer()
        if layers[0].keys is not None:  # a layer may use another one's
            layer.take([one.keys for one in layers], [one.values for one in layers], width)
        together.layers.append(layer)
        for one in layers:  # so that no more than one layer is there twice
            one.keys = one.values = None
    return together


def _crop(cache: DynamicCache, surplus: int) -> bool:
    """Drops the last positions; False where a layer cannot (a sliding window has forgotten them)."""
    try:
        cache.crop(-surplus)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError):
        return False
    return True


def common_prefix(left: list[int], right: list[int]) -> int:
    differs = (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differs, min(len(left), len(right)))
