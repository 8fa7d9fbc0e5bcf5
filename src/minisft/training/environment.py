"""With what a run is trained: machine and versions, kept in the run folder."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from minisft.training.hardware import on_cpu

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
