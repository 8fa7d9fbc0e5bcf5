"""Where models stand for inference: a copy on each GPU, or one copy over several GPUs where one is too small for it.

Layers are divided over GPUs with accelerate's `device_map`: a GPU computes its layers and passes the hidden states on
to the next one. What no GPU has room for stays in the memory of the host, from where accelerate copies it for each use.
"""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minisft.console import say
from minisft.errors import UserError
from minisft.models import base_of_adapter, is_adapter, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The largest share of a GPU's memory that weights may take. The rest is for keys and values, activations and the CUDA
# context.
WEIGHTS_SHARE = 0.8
# The same of the memory that is free when a model is loaded, where the context and other models exist already.
_FREE_SHARE = 0.9
_HEADER_LIMIT = 100 << 20  # bytes; the limit of the safetensors format


@dataclass(frozen=True)
class Placement:
    """How many copies of a model there are, and how many GPUs share each.

    Attributes:
        processes: Number of processes; each holds one copy.
        gpus_each: Number of GPUs of a process; without a GPU 1, and of no meaning.
    """

    processes: int
    gpus_each: int = 1

    def __post_init__(self) -> None:
        assert self.processes > 0
        assert self.gpus_each > 0


def count_weights(folder: Path) -> int:
    """Return the number of weights in the safetensors files of a folder, from their headers."""
    return sum(map(_count_in_file, folder.glob("*.safetensors")))


def _count_in_file(path: Path) -> int:
    """Return the number of weights in a safetensors file: 8 bytes of length, and a JSON header of that length."""
    with path.open("rb") as file:
        [length] = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, _HEADER_LIMIT)))
    count = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            product = 1
            for size in tensor["shape"]:
                product *= size
            count += product
    return count


def gpu_memory() -> list[int]:
    """Return the bytes of memory of each GPU that this process may use; [] on a CPU."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]


def free_gpu_memory() -> list[int]:
    """Return the bytes that are free now on each GPU that this process may use; [] on a CPU."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]


def gpus_for(weights: int, memory: Sequence[int]) -> int:
    """Return the smallest power of two of GPUs that hold so many bytes of weights; all GPUs, if that is not enough.

    A power of two divides the attention heads of nearly every model, as tensor parallelism needs it.

    Args:
        weights: Bytes of the weights.
        memory: Bytes of memory of each GPU.
    """
    count = 1
    while count < len(memory) and weights > WEIGHTS_SHARE * count * min(memory):
        count *= 2
    return max(1, min(count, len(memory)))


def place_copies(
    weights: int, memory: Sequence[int], *, processes: int | None = None, gpus_each: int | None = None
) -> Placement:
    """Return how many copies of a model the GPUs of this machine hold; one copy on a CPU, which uses all of its cores.

    Args:
        weights: Bytes of the weights.
        memory: Bytes of memory of each GPU; empty on a CPU.
        processes: The recipe's `evaluation.processes`; None: as many as the GPUs hold.
        gpus_each: The recipe's `evaluation.tensor_parallel_size`; None: as many GPUs as the weights need.

    Raises:
        UserError: The recipe asks for more GPUs than there are.
    """
    if not memory:
        return Placement(processes or 1, gpus_each or 1)
    if gpus_each is not None and gpus_each > len(memory):
        problem = f"it asks for {gpus_each} GPUs, and this machine has {len(memory)}"
        raise UserError("evaluation.tensor_parallel_size", problem, "leave it out, or give a smaller number")
    needed = gpus_each or gpus_for(weights, memory)
    most = len(memory) // needed
    if processes is not None and needed > 1 and processes > most:
        problem = (
            f"{processes} copies of a model with {weights / 1e9:.1f} GB of weights need {processes * needed} GPUs of "
            f"{min(memory) / 1e9:.0f} GB, and this machine has {len(memory)}"
        )
        raise UserError("evaluation.processes", problem, f"leave it out, or give at most {most}")
    return Placement(processes or most, needed)


def load_for_inference(
    folder: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    base: Path | None = None,
    load: "Callable[..., PreTrainedModel]" = load_model,
) -> "PreTrainedModel":
    """Load a model in eval mode: onto the GPU, or over all GPUs of this process if one has too little free memory.

    Args:
        folder: Folder of a model or of adapters.
        dtype: Dtype of the weights.
        trust_remote_code: Run code from the folder.
        base: Folder of the base model of adapters; None: the one that they name.
        load: Loads the weights, as `load_model` does.

    Raises:
        UserError: The folder cannot be loaded, or GPUs and host together have too little memory for it.
    """
    load = partial(load, folder, dtype=dtype, trust_remote_code=trust_remote_code, base=base)
    free = free_gpu_memory()
    weights = _weights_with_base(folder, base, trust_remote_code) * dtype.itemsize if free else 0
    options = device_map_options(weights, free, _free_host_memory()) if free else None
    if options is not None:
        model = load(**options)
        _report(model, weights)
        return model.eval()
    model = load()
    if is_divided(model):
        return model.eval()
    device: Any = "cuda" if free else "cpu"
    return model.to(device).eval()


def _weights_with_base(folder: Path, base: Path | None, trust_remote_code: bool) -> int:
    """Return the number of weights of a model; of adapters, together with those of their base model."""
    if not is_adapter(folder):
        return count_weights(folder)
    return count_weights(folder) + count_weights(base or base_of_adapter(folder, trust_remote_code))


def device_map_options(weights: int, free: Sequence[int], host: int) -> dict[str, Any] | None:
    """Return the arguments of `from_pretrained` that divide a model over GPUs; None if the first GPU has room for it.

    Args:
        weights: Bytes of the weights.
        free: Bytes that are free on each GPU.
        host: Bytes that are free in the memory of the host.

    Raises:
        UserError: GPUs and host together have too little memory.
    """
    if weights <= _FREE_SHARE * free[0]:
        return None
    room = {number: int(WEIGHTS_SHARE * one) for number, one in enumerate(free)}
    if weights > sum(room.values()) + WEIGHTS_SHARE * host:
        problem = (
            f"its weights need {weights / 1e9:.1f} GB; {len(free)} GPUs have {sum(free) / 1e9:.1f} GB free, and the "
            f"host {host / 1e9:.1f} GB"
        )
        raise UserError("the model", problem, "use more GPUs, or end what else uses their memory")
    return {"device_map": "auto", "max_memory": {**room, "cpu": int(WEIGHTS_SHARE * host)}}


def is_divided(model: Any) -> bool:
    """Return whether a model was loaded with a device map over several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def _report(model: Any, weights: int) -> None:
    places = list(model.hf_device_map.values())
    gpus = {place for place in places if place not in ("cpu", "disk")}
    on_host = len(places) - sum(place in gpus for place in places)
    text = f"note: the weights of {weights / 1e9:.1f} GB do not fit one GPU, so {len(gpus)} GPUs share them"
    if on_host:
        text += f"; {on_host} of {len(places)} parts stay in the memory of the host, which is slow"
    say(text)


def _free_host_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
