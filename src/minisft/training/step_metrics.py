"""Measurements of a training step: time, tokens, memory and bytes sent to other processes.

Vanilla's gradient reduction is issued by torch in C++, DeepSpeed's and the Trainer's by Python; all of it reaches
the operators of torch's `c10d` library. A kernel that runs before theirs counts the bytes and calls them.

Counted is the minimum that a collective has to send, as the mean over the processes, whichever algorithm the backend
uses: with N processes and S bytes in total, (N-1)/N S for all-gather, reduce-scatter, broadcast, reduce,
all-to-all, scatter and gather, twice that for all-reduce (the bus bandwidth of NVIDIA's nccl-tests, PERFORMANCE.md).
"""

import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import library


@dataclass(frozen=True)
class StepMetrics:
    """Tokens of a step over all processes, its start (`time.perf_counter`), and the bytes sent before it."""

    tokens: int = 0
    supervised_tokens: int = 0
    started: float = 0.0
    sent_before: float = 0.0

    def as_logs(self) -> dict[str, float]:
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "seconds": time.perf_counter() - self.started,
            "communication_mb": (bytes_sent() - self.sent_before) / 1e6,
        }


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB: of the GPU if there is one, else its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


# By operator: the argument that holds all bytes (for scatter and gather: the part of one process), and the number of
# times that they are sent.
_COLLECTIVES = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "broadcast_": (0, 1),
    "reduce_": (0, 1),
    "allgather_": (0, 1),
    "allgather_coalesced_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "_allgather_base_": (0, 1),
    "reduce_scatter_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "_reduce_scatter_base_": (1, 1),
    "alltoall_": (1, 1),
    "alltoall_base_": (1, 1),
    "scatter_": (0, 1),
    "gather_": (1, 1),
}

_kernels: library.Library | None = None  # kept alive while it counts
_sent = 0.0


def start_counting() -> None:
    """Start to count in this process; a second call changes nothing."""
    global _kernels
    if _kernels is not None or not torch.distributed.is_available():
        return
    _kernels = library.Library("c10d", "IMPL")
    for name, (place, times) in _COLLECTIVES.items():
        operator = getattr(torch.ops.c10d, name).default
        _kernels.impl(name, _counting(operator, place, times), "Autograd", with_keyset=True)


def bytes_sent() -> float:
    """Return the bytes that this process has sent since `start_counting`."""
    return _sent


def _counting(operator: Any, place: int, times: int) -> Callable[..., Any]:
    group_at = next(i for i, entry in enumerate(operator._schema.arguments) if entry.name == "process_group")

    def kernel(keys: Any, *arguments: Any, **more: Any) -> Any:
        global _sent
        processes = torch.distributed.ProcessGroup.unbox(arguments[group_at]).size()
        _sent += times * size_in_bytes(arguments[place]) * (processes - 1) / processes
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments, **more)

    return kernel


def size_in_bytes(tensors: Any) -> int:
    """Return the size in bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    assert isinstance(tensors, Iterable)
    return sum(size_in_bytes(one) for one in tensors)
