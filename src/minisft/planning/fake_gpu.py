"""A GPU that is not there, for a process that executes training on fake tensors.

Fake tensors (torch's FakeTensorMode) have a shape, a number format and a device, and no memory. On the device `cuda`
they need something that answers as the device: the code in torch that was built with CUDA, or fake_gpu.cpp. What the
program asks the driver of a GPU is answered here, in one place, from the data sheet of the planned machine.

`load_device` runs before torch is imported, so torch is imported inside functions only.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minisft.errors import UserError
from minisft.files import cache_folder

_SOURCE = Path(__file__).with_name("fake_gpu.cpp")
_COMPILERS = ("c++", "g++", "clang++")


def torch_folder() -> Path:
    """Return the folder of torch's package, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def build_device(torch: Path, folder: Path | None = None) -> Path | None:
    """Compile fake_gpu.cpp for a version of torch, unless it is in the cache; None: torch is built with CUDA itself.

    Args:
        torch: Folder of torch's package.
        folder: Folder to write to; None is the cache folder.

    Raises:
        UserError: There is no C++ compiler, or it refuses the file.
    """
    if list((torch / "lib").glob("libtorch_cuda*")):
        return None
    key = hashlib.sha256(f"{version('torch')} {torch} {_SOURCE.read_text(encoding='utf-8')}".encode()).hexdigest()
    library = (folder or cache_folder() / "fake_gpu") / f"fake_gpu-{key[:16]}.so"
    if library.is_file():
        return library
    where = "plan --dry-run"
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        problem = "this torch is built without CUDA, and there is no C++ compiler to build the device that stands in"
        raise UserError(where, problem, "install one (`apt install g++`), or a torch that is built with CUDA")
    library.parent.mkdir(parents=True, exist_ok=True)
    temporary = library.with_suffix(f".{os.getpid()}")
    words = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-I", str(torch / "include"), str(_SOURCE),
             "-o", str(temporary), "-L", str(torch / "lib"), "-lc10", "-ltorch_cpu"]  # fmt: skip
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise UserError(where, f"the C++ compiler {compiler} cannot be run ({error.strerror})", "set CXX") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        problem = f"the C++ compiler {compiler} refuses {_SOURCE.name}: {lines[0]}"
        raise UserError(where, problem, "set CXX to a compiler that knows C++20, or install a torch built with CUDA")
    temporary.replace(library)
    return library


def load_device(library: Path | None) -> None:
    """Make the device `cuda` known to torch; call it before torch is imported.

    Args:
        library: What `build_device` returned.
    """
    if library is not None:
        ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return
    import torch

    if not torch.cuda.is_available():
        torch._C._ensureCUDADeviceGuardSet()


def answer_for_driver(name: str, total_memory: int, capability: tuple[int, int]) -> None:
    """Answer what a program asks the driver: one GPU is there, the named one, and it has done everything at once.

    Args:
        name: Name of the GPU.
        total_memory: Its memory in bytes.
        capability: Its compute capability.
    """
    import torch

    properties = SimpleNamespace(
        name=name, total_memory=total_memory, major=capability[0], minor=capability[1], multi_processor_count=128
    )
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (total_memory, total_memory),
        # Random states: fake tensors draw no numbers.
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "get_rng_state_all": lambda: [],
        "set_rng_state_all": lambda states: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "device": lambda device: contextlib.nullcontext(),
        # Everything is done at once, so streams and events have nothing to wait for.
        "Stream": _Idle,
        "Event": _Idle,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": _Idle,
        "default_stream": _Idle,
    }
    for function, answer in answers.items():
        setattr(torch.cuda, function, answer)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *words: None  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment, method-assign]


class _Idle:
    """A stream or an event of a GPU that has nothing to do."""

    def __init__(self, *words: Any, **options: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **options: None
