"""Fused kernels for norms, rotary embeddings and the activation of MLPs: Liger's, compiled ones, or none.

`training.kernels` names them. Liger's are Triton kernels for GPUs (Hsu et al. 2024, arXiv 2410.10989), put in by the
package `liger-kernel`, without its cross-entropies: the loss stays that of loss.py. Compiled kernels are the model's
own code after `torch.compile(dynamic=True)`. Either way only this model changes: other models of the process, such as
those of an evaluation, keep their own code. The kernels are compared with the model's own layers before they are used
(kernel_proof.py). Attention has kernels of its own (attention.py).
"""

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import nn

from minisft.console import waiting
from minisft.errors import UserError
from minisft.recipe import TrainingRecipe
from minisft.text import first_line
from minisft.training.device import choose_precision
from minisft.training.kernel_proof import Proof, compare

Kernels = Literal["liger", "compile", "none"]
_WHERE = "training.kernels"
_ROTARY = "apply_rotary_pos_emb"  # the function that models of transformers call
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")  # what a gated MLP of transformers consists of


@dataclass(frozen=True)
class KernelChoice:
    """The kernels that a model trains with, and why.

    Attributes:
        asked: `training.kernels` of the recipe.
        chosen: What the model has.
        replaced: Names of the classes and functions of the model that have a kernel.
        difference: Largest relative difference to the model's own code; None: not measured.
        reason: Why a model that was asked to have kernels has none; empty if it has them, or was not asked to.
    """

    asked: str = "none"
    chosen: Kernels = "none"
    replaced: tuple[str, ...] = ()
    difference: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the entry `kernels` of environment.json."""
        return asdict(self) | {"replaced": list(self.replaced)}


@dataclass(frozen=True)
class Obstacle:
    """Why kernels cannot be used, and what to do about it."""

    problem: str
    fix: str


@dataclass(frozen=True)
class Applied:
    """Kernels that a model has; the attributes are those of `KernelChoice`."""

    replaced: tuple[str, ...]
    difference: float


def find_obstacle(kernels: str, strategy: str, device: str) -> Obstacle | None:
    """Return what keeps a strategy on a device from these kernels, as far as it shows without the model."""
    if kernels == "liger" and device != "cuda":
        return Obstacle("Liger's kernels need a GPU, and there is none here", "use auto, compile or none")
    if kernels == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return Obstacle("liger-kernel is not installed", "run `pip install 'minisft[gpu]'`, or use auto or none")
    if kernels == "compile" and strategy == "zero3":
        problem = "ZeRO-3 gathers weights around each module, and a compiled norm would keep the released ones"
        return Obstacle(problem, "use auto, liger or none, or another strategy")
    return None


def require_kernels(kernels: str, strategy: str, device: str) -> None:
    """Check that the kernels that a recipe names can be used.

    Raises:
        UserError: They cannot, and the recipe names them; `auto` does without them.
    """
    if kernels != "auto" and (obstacle := find_obstacle(kernels, strategy, device)):
        raise UserError(_WHERE, obstacle.problem, obstacle.fix)


def use_kernels(model: Any, training: TrainingRecipe, device: torch.device, resumed: str | None = None) -> KernelChoice:
    """Give a model the kernels that the recipe asks for, if they compute what the model's own code computes.

    Every process of a training calls this: all of them use the kernels, or none.

    Args:
        model: The model as it was loaded, before adapters and before DDP or DeepSpeed wrap it.
        training: The section `training` of the recipe.
        device: Device on which the model will train.
        resumed: The kernels that the run had before; None: a run that begins.

    Raises:
        UserError: The recipe, or the run that is resumed, has kernels that cannot be used or compute something else.
    """
    asked, strategy = training.kernels, training.strategy
    if "none" in (asked, resumed):
        return KernelChoice(asked)
    # Compiled kernels are not chosen by `auto`: docs/performance.md has what they gave on a CPU.
    wanted: Any = resumed or ("liger" if asked == "auto" else asked)
    obstacle = find_obstacle(wanted, strategy, device.type)
    if obstacle is None:
        with waiting(f"testing the kernels of {wanted}"):
            precision = choose_precision(training.precision)
            proof = Proof(model, device, precision, strategy, lora=training.lora is not None)
            result = _apply_proven(model, wanted, proof)
        if isinstance(result, Applied):
            return KernelChoice(asked, wanted, result.replaced, result.difference)
        obstacle = result
    if resumed is not None:
        problem = f"this run was trained with the kernels of {resumed}, and {obstacle.problem}"
        raise UserError(_WHERE, problem, "resume it where it was trained, or pass --force to train again")
    if asked != "auto":
        raise UserError(_WHERE, obstacle.problem, obstacle.fix)
    return KernelChoice(asked, reason=obstacle.problem)


def _apply_proven(model: Any, kernels: Kernels, proof: Proof) -> Applied | Obstacle:
    """Put kernels into a model and compare; if they are refused, the model has its own code again."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    problem: str | None = None
    replaced: tuple[str, ...] = ()
    difference = math.inf
    try:
        expected = proof.run()
        replaced = apply_liger(model) if kernels == "liger" else apply_compiled(model)
        difference, tolerance = compare(expected, proof.run())
        if not replaced:
            problem = f"{kernels} has no kernel for {type(model).__name__}"
        elif difference > tolerance:
            problem = (
                f"the kernels of {kernels} compute something else than the code of {type(model).__name__} "
                f"(relative difference {difference:.2g}; rounding gives at most {tolerance:g})"
            )
    except Exception as error:  # a model, a package or a compiler may fail in any way
        problem = (
            f"the kernels of {kernels} fail on {type(model).__name__} ({type(error).__name__}: {first_line(error)})"
        )
    problem = _agreed(problem)
    if problem is None:
        return Applied(replaced, difference)
    for module, attributes in before:
        vars(module).clear()
        vars(module).update(attributes)
    return Obstacle(problem, "use auto or none")


def _agreed(problem: str | None) -> str | None:
    """Return the first problem of a process, so that all processes decide alike."""
    if not torch.distributed.is_initialized():
        return problem
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    return next((one for one in problems if one is not None), None)


# --- Liger ------------------------------------------------------------------------------------------------


def apply_liger(model: Any) -> tuple[str, ...]:
    """Put Liger's kernels into a model; return the names of what they replace, none for a model that Liger has not.

    Liger also exchanges classes and functions in the model's Python module, for all models of the process. Those are
    put back, and the functions given to the layers of this model alone.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    plain = {module for module in model.modules() if "forward" not in vars(module)}
    code = vars(sys.modules[type(model).__module__])
    before = dict(code)
    try:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        functions = {name: new for name, new in code.items() if _is_other_function(new, before.get(name))}
    finally:
        code.clear()
        code.update(before)
    found = {type(module).__name__ for module in plain if "forward" in vars(module)}
    return tuple(sorted(found | _call_instead(model, functions)))


def _is_other_function(new: Any, old: Any) -> bool:
    return inspect.isfunction(new) and new is not old


def _call_instead(model: Any, functions: dict[str, Any]) -> set[str]:
    """Let the layers of a model call other functions than those of their Python module; return which are called.

    A layer gets a copy of its class's forward, with these functions among its globals. A forward inside a decorator
    keeps the function of the module.
    """
    called: set[str] = set()
    for module in model.modules():
        forward = type(module).forward
        names = functions.keys() & set(forward.__code__.co_names) if inspect.isfunction(forward) else set()
        if not names or "forward" in vars(module):
            continue
        copy = FunctionType(
            forward.__code__, forward.__globals__ | functions, forward.__name__, forward.__defaults__,
            forward.__closure__,
        )  # fmt: skip
        copy.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copy, module)
        called |= names
    return called


# --- torch.compile ----------------------------------------------------------------------------------------


def apply_compiled(model: Any) -> tuple[str, ...]:
    """Compile norms, rotary embeddings and the activation of gated MLPs; return the names of what was compiled.

    Matrix products stay outside: nothing is gained there, and adapters may be added to them. So does attention, whose
    shapes differ with every row.
    """
    compiled: dict[type, Callable[..., Any]] = {}
    for module in norms(model):
        kind = type(module)
        compiled[kind] = compiled.get(kind) or torch.compile(kind.forward, dynamic=True)
        module.forward = MethodType(compiled[kind], module)
    found = {kind.__name__ for kind in compiled}

    def gated_mlp(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        product = multiply(self.act_fn, self.gate_proj(hidden), self.up_proj(hidden))
        return self.down_proj(product)  # type: ignore[no-any-return]

    multiply = torch.compile(_activate_and_multiply, dynamic=True)
    for module in model.modules():
        if is_gated_mlp(module):
            module.forward = MethodType(gated_mlp, module)
            found.add(type(module).__name__)
    rotary = vars(sys.modules[type(model).__module__]).get(_ROTARY)
    if rotary is not None:
        found |= _call_instead(model, {_ROTARY: torch.compile(rotary, dynamic=True)})
    return tuple(sorted(found))


def norms(model: Any) -> Iterator[nn.Module]:
    """Yield the norms that are one module of a Python class; those of torch have a kernel already."""
    for module in model.modules():
        if type(module).__name__.endswith("Norm") and not type(module).__module__.startswith("torch."):
            yield module


def is_gated_mlp(module: nn.Module) -> bool:
    """Return whether a module is an MLP that multiplies two products, one of them after an activation."""
    return type(module).__name__.endswith("MLP") and all(hasattr(module, part) for part in _GATED)


def _activate_and_multiply(activation: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation(gate) * up  # type: ignore[no-any-return]
