"""What a training step does on a GPU, observed on fake tensors: waits, memory, and collectives.

Tensors on the CPU are computed; those on the GPU are fake. An operator of both raises an error as it would on a GPU.
Where the host asks for the value of a GPU's tensor it would wait, so that is counted, and it gets a plausible number.
"""

import os
import sys
import sysconfig
import traceback
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed._tools.fake_collectives  # it lets fake tensors pass through collectives
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from minisft.training import step_metrics

Phase = Literal["start", "rows", "step"]

# Code that is not the cause of an operator: the dry run's, and that which counts the bytes of collectives.
_OWN = (__file__, str(Path(__file__).with_name("dry_run_worker.py")), step_metrics.__file__)
_LIBRARIES = tuple(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = str(Path(__file__).parents[1])
_BLOCK = 512  # bytes: the caching allocator's unit
aten = torch.ops.aten
# Operators whose result the host reads, and the operators of which `False` is the answer of a healthy step.
_READS = (aten._local_scalar_dense.default, aten.equal.default)
_PINNING = (aten.is_pinned.default, aten._pin_memory.default)
_FALSE = (aten.any.default, aten.any.dim, aten.isnan.default, aten.isinf.default)


@dataclass(eq=False)
class StepTrace(TorchDispatchMode):
    """Observes every operator of a process.

    Attributes:
        phase: `rows` in forward and backward of a row of the step whose waits are counted, `step` in the rest of that
            step, otherwise `start`.
        waits: Number of times that the host waited for the GPU, by phase, place and operator.
        collectives: The collective operations of each step, in order, with shapes and number formats.
        places: File and line of each of them.
        allocated: Bytes of the GPU that are allocated now.
        kept: The same at the end of the step whose waits are counted.
        peak: Largest number of these bytes at any moment.
    """

    phase: Phase = "start"
    waits: Counter[tuple[Phase, str, str]] = field(default_factory=Counter)
    collectives: list[list[str]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    allocated: int = 0
    kept: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_fallback_kernels=False)
        self._storages: set[int] = set()
        self._only_lifted = False

    def __enter__(self) -> "StepTrace":
        self._only_lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(list, device="cuda")` is a copy that is seen here
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._only_lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        device = kwargs.get("device")
        on_gpu = device is not None and torch.device(device).type == "cuda"
        if func.namespace == "c10d" and self.collectives:
            self.collectives[-1].append(f"{func.overloadpacket.__name__}({', '.join(map(_describe, tensors))})")
            self.places.append(place_of(sys._getframe(1)))
        if func in _PINNING:
            return self._pin(func, tensors[0])
        if func is aten._amp_update_scale_.default:  # it changes two numbers, and torch knows no fake form of it
            return tensors[0]
        if not on_gpu and not any(isinstance(one, FakeTensor) for one in tensors):
            return func(*args, **kwargs)
        if func in _READS:
            if any(one.device.type == "cuda" for one in tensors):
                self._waited(func)
            return _answer(tensors[0])
        if self._copies_and_waits(func, args, kwargs, tensors):
            self._waited(func)
        with self.fake:
            if not all(isinstance(one, FakeTensor) for one in tensors):
                args, kwargs = tree_map_only(torch.Tensor, _without_values, (args, kwargs))
            result = func(*args, **kwargs)
        for one in tree_leaves(result):
            if isinstance(one, FakeTensor):
                self._allocate(one)
                if one.dtype == torch.bool and one.ndim == 0:
                    one.dry_run_value = func not in _FALSE  # type: ignore[attr-defined]
        return result

    def _pin(self, func: Any, tensor: torch.Tensor) -> Any:
        """Pin a tensor of the CPU, or say whether it is pinned: its storage gets a mark."""
        if func is aten.is_pinned.default:
            return getattr(tensor.untyped_storage(), "dry_run_pinned", False)
        pinned = tensor.clone()
        pinned.untyped_storage().dry_run_pinned = True  # type: ignore[attr-defined]
        return pinned

    def _copies_and_waits(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> bool:
        """Return whether this copy between host and GPU makes the host wait.

        The host goes on after a copy that is `non_blocking`, if the memory of the host is pinned.
        """
        if func is aten._to_copy.default:
            source, target = tensors[0], kwargs.get("device") or tensors[0].device
            non_blocking = kwargs.get("non_blocking", False)
        elif func is aten.copy_.default:
            source, target = args[1], args[0].device
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            return False
        if source.device.type == torch.device(target).type:
            return False
        pinned = source.device.type != "cpu" or getattr(source.untyped_storage(), "dry_run_pinned", False)
        return not (non_blocking and pinned)

    def _waited(self, func: Any) -> None:
        if self.phase == "start":
            return
        self.waits[self.phase, place_of(sys._getframe(2)), func.overloadpacket.__name__] += 1

    def _allocate(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._storages.add(key)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.allocated -= size


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the CPU as a fake one, where an operator has it beside tensors of the GPU."""
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _answer(tensor: torch.Tensor) -> Any:
    """Return the number that a healthy step would find: no difference, no overflow, nothing asked; checks hold."""
    if tensor.dtype == torch.bool:
        return getattr(tensor, "dry_run_value", True)
    return 0.0 if tensor.dtype.is_floating_point else 0


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def place_of(frame: Any) -> str:
    """Return file and line of the innermost code that is neither torch's nor of the dry run, and MiniSFT's line in it.

    Args:
        frame: A frame of the stack, or the traceback of an error.
    """
    stack = [one for one in _stack(frame) if not one[0].startswith((_TORCH, "<")) and one[0] not in _OWN]
    if not stack:
        return "the backward"
    places = stack[:1]
    if not stack[0][0].startswith(_PACKAGE):
        places += [one for one in stack if one[0].startswith(_PACKAGE)][:1]
    return ", called from ".join(f"{_short(file)}:{line}" for file, line, _ in places)


def place_within(package: str, frame: Any) -> str | None:
    """Return file, line and function of the innermost code of an installed package; None: it is not in the stack."""
    for file, line, function in _stack(frame):
        if _short(file).startswith(package + os.sep):
            return f"{_short(file)}:{line}, {function}"
    return None


def _stack(frame: Any) -> list[tuple[str, int, str]]:
    """Return file, line and function of each frame, innermost first."""
    walk = list(traceback.walk_tb(frame))[::-1] if hasattr(frame, "tb_frame") else list(traceback.walk_stack(frame))
    return [(one.f_code.co_filename, line, one.f_code.co_name) for one, line in walk]


def _short(file: str) -> str:
    """Return a path without the folder that the package is installed in."""
    for folder in (str(Path(_PACKAGE).parent), *_LIBRARIES):
        if file.startswith(folder):
            return str(Path(file).relative_to(folder))
    return Path(file).name
