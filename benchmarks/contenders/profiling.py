"""Where the time of training steps goes, by kind of kernel."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

# The first kind whose words are part of a kernel's name. Kernels of matrix products are named by their libraries.
KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "gemv"),
    "Triton": (  # Liger's kernels, and compiled ones
        "_rms_norm",
        "_swiglu",
        "_geglu",
        "_rope",
        "triton",
    ),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "sums and softmax": ("reduce", "softmax", "norm", "aten::sum", "aten::mean"),
    "copies and zeros": ("memcpy", "memset", "copy", "aten::cat", "fill", "zero", "index"),
    "communication": ("nccl", "c10d"),
    "element by element": ("elementwise", "vectorized", "aten::mul", "aten::add", "aten::silu", "aten::pow"),
}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


class StepProfile(TrainerCallback):
    """Profile the steps after the first ones, and put the share of each kind of kernel into `facts`.

    Of a GPU, `kinds` has a part `idle`: the share of the steps in which none of its kernels ran.

    Args:
        facts: Gets `kinds`, a share of the time by kind of kernel.
        after: Steps that are not profiled.
    """

    def __init__(self, facts: dict[str, Any], after: int) -> None:
        self.facts, self.after = facts, after
        self.on_gpu = torch.cuda.is_available()
        self.profile = profile(activities=[ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            return
        if self.on_gpu:
            torch.cuda.synchronize()
        self.profile.stop()
        kernels = [one for one in self.profile.events() or () if not self.on_gpu or one.device_type.name == "CUDA"]
        times: dict[str, float] = {}
        for one in kernels:
            own = one.time_range.elapsed_us() if self.on_gpu else one.self_cpu_time_total
            times[kind_of(one.name)] = times.get(kind_of(one.name), 0.0) + own
        if self.on_gpu and kernels:
            wall = max(one.time_range.end for one in kernels) - min(one.time_range.start for one in kernels)
            times["idle"] = max(0.0, wall - sum(times.values()))
        total = sum(times.values()) or 1.0
        self.facts["kinds"] = {kind: time / total for kind, time in times.items()}
