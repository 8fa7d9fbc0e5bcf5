"""DeepSpeed: the ZeRO stages as configurations, fp32 master weights, and its compiled communication op.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models": stage 1
shards the optimizer states, stage 2 the gradients too, stage 3 the parameters too.
This is the only module that knows DeepSpeed, except for its files, which `resharding` reads.

The op is compiled in a process of its own, which can be stopped at any moment with the compilers that it started; in
this process, Ctrl-C would wait for them.
"""

import contextlib
import functools
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from minisft.console import waiting, warn
from minisft.errors import StoppedError, UserError
from minisft.files import cache_folder, hold_lock
from minisft.optional_packages import require_package
from minisft.output_filters import drop_lines
from minisft.processes import exit_with_parent, handle_stop_signals

_SAYS_BUILT = "built successfully"  # DeepSpeed prints that of an op that it loads

# How long a process waits for the others in a collective. torch's 30 minutes end a run whose first process writes a
# large checkpoint to a slow file system while the others wait.
COLLECTIVE_TIMEOUT = timedelta(hours=3)

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names in the state of AdamW

_STAGE_OPTIONS: dict[int, dict[str, Any]] = {
    1: {"stage": 1},
    2: {"stage": 2, "contiguous_gradients": True},
    3: {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}


# What is moved to the memory of the host, by the recipe's `offload`; Ren et al. 2021, "ZeRO-Offload", and
# Rajbhandari et al. 2021, "ZeRO-Infinity".
_OFFLOADED = {None: (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}


def deepspeed_config(
    strategy: str, *, precision: str, max_grad_norm: float, batch_size: int, offload: str | None, on_cpu: bool
) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration of a strategy, or None for vanilla.

    Accumulation is 1 for DeepSpeed: the trainer tells it which backward is the last of a step.
    The optimizer is torch's AdamW under every strategy, so that all of them take the same steps.
    """
    if strategy not in ZERO_STAGES:
        return None
    to_host = {name: {"device": "cpu", "pin_memory": not on_cpu} for name in _OFFLOADED[offload]}
    # On a GPU, gradients are reduced on a stream of their own while the backward goes on; a CPU has no streams.
    overlap = {} if strategy == "zero1" else {"overlap_comm": not on_cpu}
    # The gradients of the rows of a step are summed in fp32. Stage 1 would hold the sums of all parameters on every
    # process, and send them in fp32 (DeepSpeed's BF16_Optimizer, whose checkpoints have another form).
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" and strategy != "zero1" else {}
    return sums | {
        "zero_optimization": _STAGE_OPTIONS[ZERO_STAGES[strategy]] | overlap | to_host,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "gradient_clipping": max_grad_norm,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def set_deepspeed_environment(on_cpu: bool) -> None:
    """Set the environment variables that DeepSpeed reads; call it before transformers or accelerate import it."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("LOG_LEVEL", "error")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_extensions_folder()))
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"


def import_deepspeed() -> None:
    """Import DeepSpeed if it is installed: accelerate does so in every training, and it takes seconds."""
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401


def require_deepspeed(strategy: str, on_cpu: bool) -> None:
    """Check that DeepSpeed can start, and compile its op before several processes do.

    Raises:
        UserError: DeepSpeed or a C++ compiler is missing, or its communication op does not build.
    """
    where = f"training.strategy={strategy}"
    require_package(where, "deepspeed", "use strategy vanilla")
    if not on_cpu:
        return
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise UserError(
            where,
            "DeepSpeed compiles its communication on a CPU, and there is no C++ compiler",
            "install one (apt-get install g++), or use strategy vanilla",
        )
    _compile_communication(where)


def _load_shared_memory_op() -> None:
    """Load the op, which DeepSpeed caches in the process; it is built if it was not."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


def start_communication(
    on_cpu: bool,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    load_op: Callable[[], object] = _load_shared_memory_op,
) -> None:
    """Initialise DeepSpeed's communication.

    On a CPU it must be initialised before a model is loaded under ZeRO-3: otherwise transformers would shard for
    one process and fail with sizes that do not match.

    Args:
        on_cpu: Whether the processes train on CPUs.
        timeout: How long a process waits for the others.
        load_op: Loads the compiled operation of a CPU's communication.
    """
    import deepspeed

    if on_cpu:
        with _extensions_guarded():
            load_op()
    with drop_lines(_SAYS_BUILT):
        deepspeed.init_distributed("gloo" if on_cpu else "nccl", timeout=timeout)


@contextlib.contextmanager
def plain_zero_state() -> Iterator[None]:
    """Inside the block, torch and DeepSpeed read checkpoints only as tensors, numbers and the classes of ZeRO's state.

    DeepSpeed would run any code of a pickle. These classes hold numbers: the stage, the loss scale, and where the piece
    of a parameter begins; version 0.19 writes no others (stages 1 to 3, fp32, bf16, fp16, offloaded).
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def load(engine: Any, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    loads_anything, TorchCheckpointEngine.load = TorchCheckpointEngine.load, load
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        TorchCheckpointEngine.load = loads_anything


@contextlib.contextmanager
def zero_writes_through(engine: Any, attempt: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, each file of a DeepSpeed engine's checkpoint is written by `attempt(write, ...)`.

    DeepSpeed's processes synchronise several times while saving, so none may leave with an error.

    Args:
        engine: DeepSpeed engine; None changes nothing.
        attempt: Calls its argument, and records an error of the file system in place of raising it.
    """
    if engine is None:
        yield
        return
    files, save = engine.checkpoint_engine, engine.save_checkpoint

    @functools.wraps(save)
    def save_in_parts(folder: str, **options: Any) -> None:
        save(folder, save_latest=False, **options)
        if engine.global_rank == 0:
            attempt(Path(folder, "latest").write_text, f"global_step{engine.global_steps}", encoding="utf-8")

    changed = [(files, "save", files.save), (files, "makedirs", files.makedirs),
               (engine, "_copy_recovery_script", engine._copy_recovery_script)]  # fmt: skip
    for part, name, write in changed:
        setattr(part, name, functools.partial(attempt, write))
    engine.save_checkpoint = save_in_parts
    try:
        yield
    finally:
        for part, name, _ in changed:
            delattr(part, name)  # the method of the class is visible again
        del engine.save_checkpoint


def trust_other_ranks() -> None:
    """Let ZeRO-3 not compare the order of its parameters with that of rank 0, which a dry run does not have."""
    from deepspeed.runtime.zero import utils

    utils.assert_lst_len_same_as_other_ranks = lambda numbers: None
    utils.get_lst_from_rank0 = lambda numbers: numbers


def zero_loss_scale(engine: Any) -> float:
    """Return the loss scale of an fp16 engine of stage 1, 2 or 3."""
    return float(engine.optimizer.loss_scale)


def fill_zero_engine(
    engine: Any,
    parameters: dict[str, Any],
    moment: Callable[[str, str], torch.Tensor],
    weight: Callable[[str], torch.Tensor],
    *,
    adam_steps: float,
    steps: int,
) -> None:
    """Fill an engine that has taken no step with weights and AdamW's state; every process calls this.

    Args:
        engine: Engine of stage 1, 2 or 3 with torch's AdamW.
        parameters: Trained parameters of its module, by name; they are filled one after the other.
        moment: Returns the complete moment for a parameter's name and one of `MOMENTS`, flat, in fp32 on the CPU.
        weight: Returns the complete fp32 weight in the same way; the module gets it in its own format too.
        adam_steps: Number of steps that AdamW has taken.
        steps: Number of steps that the engine has taken.
    """
    _make_adam_states(engine.optimizer, adam_steps)
    fill = _fill_sharded if engine.zero_optimization_partition_weights() else _fill_replicated
    for name, parameter in parameters.items():
        fill(parameter, weight(name), {kind: moment(name, kind) for kind in MOMENTS})
    engine.global_steps = steps
    engine.global_samples = steps * engine.train_batch_size()


def fill_fp32_masters(engine: Any, parameters: dict[str, Any], exact: Callable[[str], torch.Tensor | None]) -> None:
    """Fill the optimizer of a half-precision engine with the fp32 weights from which its module was rounded.

    DeepSpeed makes its own fp32 weights after it has rounded the module. They would begin exactly on rounded numbers,
    so that no step below half a unit in the last place would change the module, and the first steps would learn
    little: with SmolLM2-135M in bf16 at 2e-5 losses were 4 % to 11 % above vanilla's.

    Args:
        engine: Engine of stage 1, 2 or 3 that has taken no step.
        parameters: Trained parameters of its module, by name.
        exact: Returns the complete fp32 weight for a parameter's name, flat, on the CPU, or None if there is none.
    """
    restore = _restore_sharded if engine.zero_optimization_partition_weights() else _restore_replicated
    for name, parameter in parameters.items():
        weight = exact(name)
        if weight is not None:
            restore(parameter, weight)


def _restore_replicated(parameter: Any, weight: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    if _is_rounding(parameter.data, weight):
        safe_set_full_fp32_param(parameter, weight.view_as(parameter))


def _restore_sharded(parameter: Any, weight: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_local_fp32_param

    held = parameter.ds_tensor
    # The last shard is padded: the slice leaves the padding out.
    own = weight[torch.distributed.get_rank() * held.numel() :][: held.numel()]
    if weight.numel() == parameter.ds_numel and _is_rounding(held.flatten()[: len(own)], own):
        safe_set_local_fp32_param(parameter, _part_here(parameter, weight))


def _is_rounding(held: torch.Tensor, exact: torch.Tensor) -> bool:
    """Return whether `held` is `exact` in lower precision, and not a different tensor of the same name."""
    return held.numel() == exact.numel() and torch.equal(exact.to(held.dtype), held.flatten().to(exact.device))


def _make_adam_states(optimizer: Any, steps: float) -> None:
    """Make the states of torch's AdamW inside ZeRO's optimizer, as its first step would."""
    sharded = hasattr(optimizer, "fp32_partitioned_groups_flat")
    for flat in optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups:
        count = torch.tensor(steps, dtype=torch.float32, device=flat.device)
        moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
        optimizer.optimizer.state[flat] = {"step": count, **moments}
    if not sharded:
        optimizer._lazy_init_hp_params_optimizer_state()  # from here on each parameter has its piece of them


def _fill_replicated(parameter: Any, weight: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
    """Fill a parameter of stage 1 or 2: each process holds the complete parameter, and its piece of the state."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameter.data.copy_(weight.view_as(parameter))
    safe_set_full_fp32_param(parameter, weight)
    for kind, moment in moments.items():
        safe_set_full_optimizer_state(parameter, moment, kind)


def _fill_sharded(parameter: Any, weight: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
    """Fill a parameter of stage 3; with `safe_set_full_*` DeepSpeed would miss the padding of the last process."""
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(weight.view_as(parameter))
    safe_set_local_fp32_param(parameter, _part_here(parameter, weight))
    for kind, moment in moments.items():
        safe_set_local_optimizer_state(parameter, _part_here(parameter, moment), kind)


@contextlib.contextmanager
def gathered(parameters: list[Any]) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has sharded, within the context; all processes must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def _part_here(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    size = parameter.ds_tensor.numel()
    piece = whole[torch.distributed.get_rank() * size :][:size]
    return torch.nn.functional.pad(piece, (0, size - len(piece)))


def _compile_communication(where: str) -> None:
    """Build DeepSpeed's shared-memory op once, after a message, since it takes about a minute.

    Raises:
        UserError: It does not compile.
        StoppedError: SIGINT or SIGTERM was received meanwhile.
    """
    set_deepspeed_environment(on_cpu=True)
    extensions = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    if not _is_built(extensions):
        warn(f"compiling DeepSpeed's communication, once, which takes a minute or two; it is kept in {extensions}")
    with _extensions_guarded():
        if _is_built(extensions):  # built before, or by another process meanwhile
            return
        with waiting("compiling DeepSpeed's communication"):
            reason = compile_in_subprocess(clean_up=lambda: _remove_locks(extensions / "deepspeed_shm_comm"))
    if reason is not None:
        raise UserError(
            where,
            f"DeepSpeed's communication does not compile here ({reason})",
            "install a C++ compiler, ninja and the Python headers, or use strategy vanilla",
        )


def _is_built(extensions: Path) -> bool:
    return any(extensions.glob("**/deepspeed_shm_comm*.so"))


def _remove_locks(extensions: Path) -> None:
    """Remove the lock files of killed builds: the next build would wait for them for ever."""
    for left_over in extensions.glob("**/lock"):
        left_over.unlink(missing_ok=True)


@contextlib.contextmanager
def _extensions_guarded() -> Iterator[Path]:
    """Lock the folder of compiled extensions, as every process does that builds or loads one.

    While torch builds or loads, a file `lock` exists, on which other processes wait; a killed process leaves it for
    ever. The lock of this function dies with its process, so the holder knows that such a file is a leftover.
    """
    extensions = _extensions_folder()
    extensions.mkdir(parents=True, exist_ok=True)
    with hold_lock(extensions / ".minisft.lock", patience=math.inf):
        if os.environ.get("TORCH_EXTENSIONS_DIR") == str(extensions):  # otherwise other users of the folder build too
            _remove_locks(extensions)
        yield extensions


def _extensions_folder() -> Path:
    """Return the folder for this build of torch: extensions of another build would be built again, or not load."""
    build = hashlib.sha256(f"{torch.__version__} {sys.prefix}".encode()).hexdigest()[:12]
    return cache_folder() / "torch_extensions" / build


def build_communication() -> None:
    """Compile DeepSpeed's shared-memory op in this process, if it is not compiled yet."""
    set_deepspeed_environment(on_cpu=True)
    _load_shared_memory_op()


_COMMAND = ("-m", "minisft.training.zero")


def compile_in_subprocess(clean_up: Callable[[], object], command: tuple[str, ...] = _COMMAND) -> str | None:
    """Compile the op, and wait for it; SIGINT and SIGTERM end it at once.

    Args:
        clean_up: Called once no process of the build is left.
        command: Arguments of the Python that compiles.

    Returns:
        The reason why it failed, or None.

    Raises:
        StoppedError: This process was asked to stop.
    """
    with handle_stop_signals(_stop):
        process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, preexec_fn=exit_with_parent,
        )  # fmt: skip
        try:
            printed, _ = process.communicate()
        finally:
            if process.poll() is None:
                _kill_with_children(process.pid)
            process.wait()
            clean_up()
    if process.returncode == 0:
        return None
    lines = [line for line in printed.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"it ended with status {process.returncode}"


def _kill_with_children(pid: int) -> None:
    """Kill a process and the compilers that it started, which ninja puts into process groups of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _stop(number: int, frame: object) -> None:
    raise StoppedError(f"stopped while DeepSpeed's communication was compiled ({signal.Signals(number).name})")


def main() -> None:
    build_communication()


if __name__ == "__main__":
    main()


@contextlib.contextmanager
def load_unsharded(config: Any) -> Iterator[None]:
    """Let from_pretrained load complete models inside the block: under ZeRO-3 all processes would have to shard them.

    Args:
        config: The TrainingArguments' `hf_deepspeed_config`; None: not under DeepSpeed.
    """
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)
