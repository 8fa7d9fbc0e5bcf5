"""bf16 weights for forward and backward, and fp32 masters in the optimizer.

Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3.1. DeepSpeed does this under ZeRO;
this module does it for vanilla. No optimizer of torch or transformers keeps masters: DistributedDataParallel's
`_MixedPrecision` is private and casts all weights in every forward, as autocast does, and the fused optimizers of apex
and Transformer Engine are for GPUs only. Torch's hooks do it in few lines: `Tensor.register_post_accumulate_grad_hook`
and `Optimizer.register_step_post_hook`.
"""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import nn


class MasterWeights:
    """Rounded copies of a model's fp32 weights, which take their place in the model; the fp32 weights are the masters.

    The gradients of the rows of a step are summed in fp32, in the `grad` of the masters. With several processes, DDP
    averages the sum of a process in bf16, as DeepSpeed does, which halves its traffic.

    Attributes:
        reducing: Whether DDP reduces the gradients of the next backward, the last one of a step.
    """

    def __init__(self, model: nn.Module) -> None:
        """Round the weights of a model; call this before DDP wraps it and before its optimizer is made.

        Args:
            model: Model with fp32 weights on the device of the training. Weights stay in fp32 where its class says so
                (`_keep_in_fp32_modules_strict` of transformers), as under DeepSpeed.
        """
        self.reducing = False
        # Of each module, the name of a weight, its master and its rounded copy; tied weights share them.
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self._masters: dict[nn.Parameter, nn.Parameter] = {}  # by the rounded copy
        keeping = [name.replace("*", ".*") for name in getattr(model, "_keep_in_fp32_modules_strict", None) or ()]
        rounded: dict[nn.Parameter, nn.Parameter] = {}
        for path, module in model.named_modules():
            for name, master in list(module.named_parameters(recurse=False)):
                full_name = f"{path}.{name}" if path else name
                if master.dtype != torch.float32 or any(re.search(pattern, full_name) for pattern in keeping):
                    continue
                if master not in rounded:
                    rounded[master] = nn.Parameter(master.detach().bfloat16(), master.requires_grad)
                    self._masters[rounded[master]] = master
                self._places.append((module, name, master, rounded[master]))
        for weight in self._masters:
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._add_gradient)
        self._show(masters=False)

    def update_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Round the masters after each step of their optimizer, which was made inside `in_fp32`."""
        optimizer.register_step_post_hook(lambda *_: self._end_step())

    @contextlib.contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Inside the block the model has its fp32 weights; who changes them calls `round` afterwards."""
        self._show(masters=True)
        try:
            yield
        finally:
            self._show(masters=False)

    def of(self, weight: nn.Parameter) -> nn.Parameter:
        """Return the master of a weight of the model; a weight that stays in fp32 is its own."""
        return self._masters.get(weight, weight)

    @torch.no_grad()
    def round(self) -> None:
        """Copy the masters to the weights of the model."""
        if self._masters:
            torch._foreach_copy_(list(self._masters), list(self._masters.values()))

    def collect_reduced(self) -> None:
        """Move the gradients that DDP averaged to the masters, after the last backward of a step."""
        for weight, master in self._masters.items():
            if weight.grad is not None:
                master.grad = weight.grad.float()
                weight.grad = None

    def _show(self, masters: bool) -> None:
        for module, name, master, rounded in self._places:
            setattr(module, name, master if masters else rounded)

    def _add_gradient(self, weight: torch.Tensor) -> None:
        """Add the gradient of a row to the sum in fp32; for DDP, which comes next, leave the sum in the weight."""
        gradient, master = weight.grad, self._masters[weight]  # type: ignore[index]
        assert gradient is not None
        if self.reducing:
            if master.grad is not None:
                gradient.copy_(master.grad.add_(gradient))
            return
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)
        weight.grad = None

    def _end_step(self) -> None:
        self.round()
        for master in self._masters.values():
            master.grad = None


def uses_masters(strategy: str, precision: str, *, lora: bool) -> bool:
    """Return whether a training keeps its masters here: vanilla in bf16, where all weights are trained.

    Adapters are in fp32 and small. fp16 has autocast and a loss scale, and ZeRO has DeepSpeed's masters.
    """
    return strategy == "vanilla" and precision == "bf16" and not lora
