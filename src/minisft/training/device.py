"""What this machine can do: devices, cores, number formats and versions."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from minisft.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and torch's of what it needs
_KERNELS = 64  # a row of a Llama needs some 21: three products, forward and twice backward, of seven layers' shapes


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def choose_precision(asked: str) -> str:
    """Return fp32, bf16 or fp16 for the recipe's `precision`.

    `auto` is bf16 where a GPU has it, else fp16 on a GPU; on a CPU bf16 only with AVX512-BF16 or AMX, since
    without them it is many times slower than fp32.

    Raises:
        UserError: fp16 on a CPU.
    """
    if asked == "fp16" and on_cpu():
        raise UserError("training.precision", "fp16 is for GPUs, and there is none here", "use auto, fp32 or bf16")
    if asked != "auto":
        return asked
    if on_cpu():
        return "bf16" if cpu_has_bf16_arithmetic() else "fp32"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def require_processes(processes: int) -> None:
    """Check that there is a GPU or a core for each process.

    Raises:
        UserError: naming how many there are.
    """
    available = len(os.sched_getaffinity(0)) if on_cpu() else torch.cuda.device_count()
    if processes > available:
        kind = "cores" if on_cpu() else "GPUs"
        raise UserError(
            "training.processes",
            f"{processes} processes, and this machine has {available} {kind}",
            f"use at most {available}; gradient_accumulation keeps the global batch",
        )


def default_tokens_per_forward(on_cpu: bool) -> int:
    """Return the tokens of a forward: on a CPU larger rows take memory and are no faster; on a GPU they fill it."""
    return 512 if on_cpu else 16384


def threads_of_a_process(processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // processes)


def cpu_has_bf16_arithmetic() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _keep_freed_memory() -> None:
    """Tell glibc to keep what training frees: every step needs the same large blocks again.

    By default they go back to the kernel at every free and are faulted in page by page at the next step. On two
    cores and a 135M model this took 5 % of a step (mallopt(3): M_TRIM_THRESHOLD, M_MMAP_MAX).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def prepare_cpu_memory(
    strategy: str, precision: str, cpu: bool, keep_freed_memory: Callable[[], object] = _keep_freed_memory
) -> None:
    """Set how a CPU's process keeps memory; call it before the first product.

    Args:
        strategy: Strategy that the process trains under.
        precision: fp32, bf16 or fp16.
        cpu: Whether the process trains on a CPU; on a GPU this function does nothing.
        keep_freed_memory: Tells the allocator of this process to keep what it frees.
    """
    if not cpu:
        return
    if precision != "fp32":
        _keep_few_kernels()
    if keeps_freed_memory(strategy, half=precision != "fp32"):
        keep_freed_memory()


def keeps_freed_memory(strategy: str, *, half: bool) -> bool:
    """Say whether freed memory stays a CPU process's.

    Not under ZeRO, whose blocks seldom fit the holes that others left. Nor in half precision, whose kernels are
    allocated while a row is computed and stay: what is freed around them is holes too small for the next row, and
    0.5 GB more for a 135M model would save 4 % of a step.
    """
    return strategy == "vanilla" and not half


def _keep_few_kernels() -> None:
    """Keep a few rows' kernels; by default oneDNN and torch keep 1,024 each, of about a megabyte, for every row length.

    They read this when they make the first kernel (oneDNN's manual: "Primitive Cache"; torch: ideep's lru_cache.hpp).
    A user's own value stays.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_KERNELS))


PACKAGES = (
    "minisft", "torch", "transformers", "accelerate", "deepspeed", "peft", "tokenizers", "datasets", "sacrebleu",
)  # fmt: skip


def describe_environment(precision: str) -> dict[str, Any]:
    """Precision, Python, system, devices and the versions of what takes part; nothing that names a person or a host.

    Args:
        precision: that `auto` came to: fp32, bf16 or fp16.
    """
    return {
        "precision": precision,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "devices": [] if on_cpu() else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
