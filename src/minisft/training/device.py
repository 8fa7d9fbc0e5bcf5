"""The machine: devices, cores, number formats and versions."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from minisft.errors import UserError
from minisft.processes import WAITING_VARIABLES

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's kernels, and torch's
# The settings of torch's allocator: their name since torch 2.9, and before it.
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_KERNELS = 64  # a row of a Llama needs about 21: three products (forward, two backward) of seven shapes


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def choose_precision(asked: str) -> str:
    """Return fp32, bf16 or fp16 for the recipe's `precision`.

    `auto` is bf16 where a GPU has it, else fp16 on a GPU; on a CPU bf16 only with AVX512-BF16 or AMX, since
    without them it is many times slower than fp32.

    Raises:
        UserError: fp16 is asked for on a CPU.
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
        UserError: There are fewer; the message says how many there are.
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
    """Return the number of tokens of a forward: on a CPU larger rows are not faster; on a GPU they use it fully."""
    return 512 if on_cpu else 16384


def threads_of_a_process(processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // processes)


def keep_threads(recorded: int | None) -> None:
    """Compute with as many threads as the run so far: with another number, sums are rounded in another order.

    Args:
        recorded: Number of threads of each process of the run; None: unknown, as for a run of an earlier version.

    Raises:
        UserError: OMP_NUM_THREADS asks for another number.
    """
    if recorded is None or recorded == torch.get_num_threads() or not on_cpu():
        return
    if "OMP_NUM_THREADS" in os.environ:
        now = torch.get_num_threads()
        problem = f"the run was trained with {recorded} threads a process, and would go on with {now}: its bits differ"
        raise UserError("OMP_NUM_THREADS", problem, f"set it to {recorded}")
    torch.set_num_threads(recorded)


def cpu_has_bf16_arithmetic() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: every training step needs the same large blocks again.

    By default they are returned to the kernel when freed, and are faulted in page by page in the next step. On two
    cores and a 135M model this took 5 % of a step (mallopt(3): M_TRIM_THRESHOLD, M_MMAP_MAX).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no mallopt
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def prepare_cpu_memory(
    strategy: str, precision: str, cpu: bool, keep_freed_memory: Callable[[], object] = _keep_freed_memory
) -> None:
    """Set how a process that trains on a CPU keeps memory; call it before the first matrix product.

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
    """Return whether a process that trains on a CPU keeps freed memory.

    Not under ZeRO, whose blocks rarely fit the holes that others left. Nor in half precision, whose kernels are
    allocated while a row is computed and stay, so that the memory freed around them is too fragmented for the next row:
    0.5 GB more for a 135M model would save 4 % of a step.
    """
    return strategy == "vanilla" and not half


def use_expandable_segments(cpu: bool) -> None:
    """Let torch's allocator of GPU memory grow its blocks; call it before the first tensor on a GPU.

    Rows have different lengths, so blocks of fixed sizes become too fragmented for the next row (torch's notes: "CUDA
    semantics", "Optimizing memory usage"). Settings of the user stay, as one variable or under its older name.
    """
    if not cpu and not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0 if torch.__version__ >= "2.9" else 1]] = "expandable_segments:True"


def use_deterministic_kernels(asked: bool) -> None:
    """Let torch take only kernels that give the same bits every time; call it before the first one.

    On a GPU, others add up in the order in which threads finish (torch's notes: "Reproducibility"). cuBLAS needs a
    workspace of fixed size for it, which it reads from the environment (cuBLAS manual: "Results reproducibility").
    """
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(asked)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it here


@contextlib.contextmanager
def explain_missing_kernels() -> Iterator[None]:
    """Name the recipe's key where torch has no deterministic kernel of an operation.

    Raises:
        UserError: In place of torch's RuntimeError, which names the operation.
    """
    try:
        yield
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        operation = str(error).split(" does not have")[0].split(" only has")[0]
        problem = f"torch has no deterministic kernel of {operation} on this GPU"
        raise UserError("training.deterministic", problem, "set it to false, or use another model") from None


def _keep_few_kernels() -> None:
    """Cache the kernels of a few rows; by default oneDNN and torch cache 1,024 of about a megabyte each, by row length.

    They read this when they make the first kernel (oneDNN's manual: "Primitive Cache"; torch: ideep's lru_cache.hpp).
    A value that the user set stays.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_KERNELS))


PACKAGES = (
    "minisft", "torch", "transformers", "accelerate", "deepspeed", "peft", "tokenizers", "datasets", "sacrebleu",
    "liger-kernel",
)  # fmt: skip


def describe_environment(precision: str) -> dict[str, Any]:
    """Return precision, Python, system, devices, threads and versions of libraries.

    Nothing in it identifies a person or a host.

    Args:
        precision: Precision that `auto` chose: fp32, bf16 or fp16.
    """
    return {
        "precision": precision,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting_policy": {name: os.environ[name] for name in WAITING_VARIABLES if name in os.environ},
        "devices": [] if on_cpu() else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
