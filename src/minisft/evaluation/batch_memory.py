"""How many rows fit into memory together: the size of the model's cache, and smaller batches where memory runs out."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from minisft.errors import UserError
from minisft.evaluation.generation import CACHE_POSITIONS, last_logits, plan_batches
from minisft.evaluation.kv_cache import new_cache
from minisft.models import is_out_of_memory

# The share of the free memory that keys and values may take. The rest is for activations, logits, and the copies of
# one layer's keys and values that a growing cache and grouped queries need.
_CACHE_SHARE = 0.5

Result = TypeVar("Result")


@dataclass(frozen=True)
class LayerSize:
    """Memory that one layer's cache takes for each row.

    Attributes:
        device: Device of the cache.
        position_bytes: Bytes for each position.
        state_bytes: Bytes that do not depend on the number of positions (recurrent states, convolutions).
        window: Most positions that are kept (sliding windows); None keeps all.
    """

    device: torch.device
    position_bytes: int
    state_bytes: int
    window: int | None


@dataclass(frozen=True)
class CacheSize:
    """Memory that a model's cache takes, layer by layer."""

    layers: tuple[LayerSize, ...]

    @classmethod
    @torch.inference_mode()
    def measure(cls, model: Any) -> "CacheSize":
        """Measure what the cache allocates for one and for two tokens.

        So it is true of every architecture that transformers can cache: grouped queries, latent attention, sliding
        windows, recurrent states, layers that share keys and values, and layers on several devices.
        """
        one, two = (_filled_cache(model, tokens) for tokens in (1, 2))
        layers = []
        for first, second in zip(one.layers, two.layers, strict=True):
            tensors = _tensors(second)
            if not tensors:  # it shares the keys and values of another layer
                continue
            short, long = (sum(tensor.nbytes for tensor in _tensors(layer)) for layer in (first, second))
            window = getattr(second, "sliding_window", None)
            layers.append(LayerSize(tensors[0].device, long - short, 2 * short - long, window))
        return cls(tuple(layers))

    def row_bytes(self, positions: int) -> dict[torch.device, int]:
        """Return the bytes of a row with so many positions, on each device."""
        found: dict[torch.device, int] = {}
        for layer in self.layers:
            kept = positions if layer.window is None else min(positions, layer.window)
            found[layer.device] = found.get(layer.device, 0) + layer.state_bytes + kept * layer.position_bytes
        return found

    def most_rows(self, positions: int, free: Mapping[torch.device, float]) -> int:
        """Return the number of rows with so many positions that fit, at least 1.

        Args:
            positions: Positions of the longest row.
            free: Bytes that the caches may take on each device.
        """
        sizes = self.row_bytes(positions)
        return max(1, min((int(free[device] // size) for device, size in sizes.items() if size), default=1))


def cache_budget(size: CacheSize, share: float = 1.0) -> dict[torch.device, float]:
    """Return the bytes that caches may take on each device of a model that is loaded, and has computed nothing yet.

    Args:
        size: The model's cache.
        share: Share of the device's free memory that this process may use.
    """
    return {device: _CACHE_SHARE * share * _free_memory(device) for device in {layer.device for layer in size.layers}}


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def _filled_cache(model: Any, tokens: int) -> Any:
    cache = new_cache(model)
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    last_logits(model, ids, torch.ones_like(ids), cache)
    return cache


def _tensors(layer: Any) -> list[torch.Tensor]:
    """Return the tensors that a layer of a cache holds for its rows."""
    found = []
    for value in vars(layer).values():
        held = value.values() if isinstance(value, dict) else (value,)
        found += [one for one in held if isinstance(one, torch.Tensor) and one.dim() > 1]
    return found


@dataclass
class BatchLimit:
    """The largest batch, which is halved whenever memory runs out.

    Attributes:
        positions: Most rows times positions of the longest one; None as long as memory has not run out.
        halved_at: Number of rows with which memory ran out first, for a message.
    """

    positions: int | None = None
    halved_at: int | None = None

    def rows(self, longest: int, most: int) -> int:
        """Return the number of rows of a batch whose longest row has so many positions, at most `most`."""
        return most if self.positions is None else max(1, min(most, self.positions // longest))

    def halve(self, rows: int, longest: int) -> None:
        self.positions = rows * longest // 2
        self.halved_at = self.halved_at or rows


def compute_in_batches(
    lengths: Sequence[int],
    most_rows: Callable[[int], int],
    compute: Callable[[list[int]], Result],
    limit: BatchLimit,
    where: object,
) -> Iterator[tuple[list[int], Result]]:
    """Yield the indices of each batch and what `compute` returns for them, the longest rows first.

    Where memory runs out, the batch is halved and computed again.

    Args:
        lengths: Positions that each row needs.
        most_rows: Returns the most rows of a batch whose longest row has so many positions.
        compute: Computes the rows with these indices.
        limit: Limit of the batches, which is lowered where memory runs out.
        where: Names the model in the message.

    Raises:
        UserError: Memory does not suffice for a single row.
    """
    left = list(range(len(lengths)))
    while left:
        sizes = [lengths[index] for index in left]
        places = plan_batches(sizes, len(left), lambda longest: limit.rows(longest, most_rows(longest)))[0]
        batch, longest = [left[place] for place in places], sizes[places[0]]
        try:
            result = compute(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                problem = f"memory ran out with a single row of {longest:,} tokens"
                raise UserError(where, problem, "use GPUs with more memory, or shorter conversations") from None
            limit.halve(len(batch), longest)
        else:
            yield batch, result
            taken = set(batch)
            left = [index for index in left if index not in taken]
            continue
        free_unused_memory()  # here, where the error no longer holds the tensors of its frames


def free_unused_memory() -> None:
    """Return memory that nothing uses to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_on_cpu(positions: int) -> int:
    """Return the most rows of a batch on a CPU, which gains nothing from larger ones."""
    return max(1, CACHE_POSITIONS // positions)
