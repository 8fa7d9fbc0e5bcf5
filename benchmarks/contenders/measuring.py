"""What is measured in every contender alike: a callback of the Trainer that all of them build upon."""

import json
import re
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Timer(TrainerCallback):
    """Write the seconds from the beginning of training to the end of each step, and the peak of memory there.

    Loading, preparation and what is saved after the last step are no part of either.

    Attributes:
        facts: what else is written.
    """

    def __init__(self, result: Path, **facts: Any) -> None:
        self.result = result
        self.facts: dict[str, Any] = facts
        self.started = 0.0
        self.stamps: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.facts["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        self.stamps.append(time.perf_counter() - self.started)
        measured = {
            "seconds": self.stamps[-1], "stamps": self.stamps, "steps": state.global_step, "peak_mb": peak_mb()
        }  # fmt: skip
        self.result.write_text(json.dumps(self.facts | measured))


def peak_mb() -> float:
    """Return the largest resident size of this process in MB.

    Linux's `ru_maxrss` begins with what the process that started this one held, so its own record is read first.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    kilobytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024 / 1e6
