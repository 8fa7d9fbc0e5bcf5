"""The process of a dry run, `python -m minisft.planning.dry_run_worker JOB RANK`: one for each rank that is compared.

JOB is a folder that `dry_run.dry_run` wrote: the machine in `job.json`, and the run folder `run` with a recipe and
prepared data. The result is written into it as `result-RANK.json`.

The real trainer takes the steps; what differs from training is that the GPU is fake (fake_gpu.py), and that
numbers which only a GPU could compute are not there: the probe of the model and the trial of the attention kernels.
Kernels of Liger have stand-ins (liger_memory.py); what `training.kernels: compile` would compile is not compiled.
"""

import json
import os
import sys
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from minisft.planning import fake_gpu


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    # 1. The device, before torch is imported; then the answers of its driver, and the other processes.
    fake_gpu.load_device(None if job["library"] is None else Path(job["library"]))
    fake_gpu.answer_for_driver(job["gpu"], job["total_memory"], tuple(job["capability"]))
    if job["processes"] > 1 or job["strategy"] != "vanilla":
        _join(rank, job["processes"], job["strategy"])
    # 2. The steps.
    result = _observe(folder / "run", job)
    # 3. The result.
    (folder / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)  # without the clean-up of libraries that believe in a GPU


def _join(rank: int, processes: int, strategy: str) -> None:
    """Make this process one of several, whose collectives return at once."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from minisft.training.zero import trust_other_ranks

    # One GPU is visible to each process, so the local rank is 0.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    torch.distributed.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    _let_ddp_reduce()
    if strategy == "zero3":
        trust_other_ranks()


def _let_ddp_reduce() -> None:
    """Let DDP do without the other processes: it reads back their number of parameters, and the sums of a bucket."""
    import torch
    from torch.nn.parallel import distributed

    def all_reduce(_: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        torch.distributed.all_reduce(bucket.buffer())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer().div_(torch.distributed.get_world_size()))
        return done

    make = distributed.DistributedDataParallel.__init__

    def init(self: Any, *words: Any, **options: Any) -> None:
        make(self, *words, **options)
        self.register_comm_hook(None, all_reduce)
        self.logger = SimpleNamespace(
            set_runtime_stats_and_log=lambda: None, set_error_and_log=print
        )  # it asks a timer

    distributed.DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
    distributed._verify_param_shape_across_processes = lambda *words: None  # type: ignore[attr-defined]


def _observe(root: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Take the steps of the run at `root`; return what was observed, and the error that ended them."""
    from minisft.planning.step_trace import StepTrace
    from minisft.run_folder import RunFolder, load_run
    from minisft.training.run_training import make_trainer, take_steps

    recipe = load_run(root, trust_remote_code=job["trust_remote_code"])
    trace, kernels = StepTrace(), Counter[str]()
    rows: list[list[tuple[int, int]]] = []
    error = None
    _name_kernels(kernels)
    _let_parameters_move()
    try:
        with trace:
            build = partial(_build, trace, job["liger"])
            trainer: Any = make_trainer(recipe, RunFolder(root), build=build)
            trainer.args.save_strategy = "no"
            trainer.probe = partial(_call_of, trainer)
            _mark_phases(trainer, trace, rows)
            take_steps(trainer, RunFolder(root))
    except Exception as raised:  # whatever a step may raise on a GPU
        traceback.print_exc()
        error = _describe(raised, in_steps=bool(rows), zero=job["strategy"] != "vanilla")
    return {
        "error": error,
        "rows": rows,
        "kernels": dict(kernels),
        "waits": [[*key, count] for key, count in trace.waits.items()],
        "collectives": [list(step) for step in trace.collectives],
        "places": trace.places,
        "kept_bytes": trace.kept,
        "peak_bytes": trace.peak,
    }


def _describe(error: Exception, in_steps: bool, zero: bool) -> dict[str, str]:
    """Return kind, place and message of an error; the kind `not possible` says nothing about the step on a GPU."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )

    from minisft.errors import UserError
    from minisft.planning.step_trace import place_of, place_within
    from minisft.text import first_line

    where, said = place_of(error.__traceback__), f"{type(error).__name__}: {first_line(error)}"
    if error.__cause__ is not None:
        said += f" ({first_line(error.__cause__)})"
    if deepspeed := place_within("deepspeed", error.__traceback__):
        return {"kind": "not possible", "where": where, "problem": f"DeepSpeed cannot do it: {deepspeed}: {said}"}
    if isinstance(error, UnsupportedOperatorException):
        problem = f"the operator {error.func} cannot be computed without a GPU ({where})"
        return {"kind": "not possible", "where": where, "problem": problem}
    if isinstance(error, UserError) and not in_steps:
        return {"kind": "not possible", "where": where, "problem": str(error)}
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        problem = f"the CPU waits for the GPU: {error.func} has a result whose shape depends on values"
        return {"kind": "wait", "where": where, "problem": problem}
    if "different devices" in str(error) or "on the same device" in str(error):
        return {"kind": "device", "where": where, "problem": f"a tensor of the CPU meets one of the GPU ({said})"}
    if zero:
        return {"kind": "not possible", "where": where, "problem": f"{where}: {said}"}
    if "NVIDIA driver" in said or "CUDA driver" in said or "CUDA error" in said:  # code in C++ that asks it directly
        return {"kind": "not possible", "where": where, "problem": f"torch asks the driver of a GPU: {where}: {said}"}
    return {"kind": "error", "where": where, "problem": said}


def _build(
    trace: Any, liger: bool, folder: Path, *, dtype: Any, attention: str, trust_remote_code: bool, **options: Any
) -> Any:
    """Make the model that `load_model` would load, of fake tensors on the CPU: the trainer moves them to the GPU."""
    from minisft.models import build_on_meta_device, load_config
    from minisft.planning.liger_memory import apply_stand_ins

    config = load_config(folder, trust_remote_code)
    with trace.fake:
        model = build_on_meta_device(config, trust_remote_code, attn_implementation=attention, dtype=dtype)
    if liger:
        apply_stand_ins(model)
    return model


def _let_parameters_move() -> None:
    """Let `Module.to` swap a fake parameter with its copy on the GPU.

    Torch refuses that where a weak reference exists, and the mode remembers by such references what it made. A
    parameter that is on the device already stays as it is: the hooks of its gradient, as those of `MasterWeights`,
    would be lost.
    """
    import torch

    swap = torch.utils.swap_tensors

    def swap_tensors(one: Any, other: Any) -> None:
        if (one.device, one.dtype) == (other.device, other.dtype):
            return
        with mock.patch("weakref.getweakrefs", return_value=[]):
            swap(one, other)

    torch.utils.swap_tensors = swap_tensors


def _name_kernels(calls: Counter[str]) -> None:
    """Note the kernel of every attention call; the trial of a kernel shows that it takes the tensors, and no more."""
    import torch

    from minisft.training import attention

    select, verified = attention.select_kernel, attention.first_verified

    def first_verified(kernels: Any, shape: Any) -> Any:
        generator = torch.Generator()
        with mock.patch.object(torch, "Generator", return_value=generator):
            return verified(kernels, shape)

    def selected(shape: Any, dropout: float) -> Any:
        kernel = select(shape, dropout)
        calls[f"{kernel.__name__ if kernel else None} {str(shape.dtype).removeprefix('torch.')}"] += 1
        return kernel

    attention.first_verified, attention.select_kernel = first_verified, selected


def _call_of(trainer: Any) -> None:
    from minisft.training.loss import unwrapped
    from minisft.training.model_call import ModelCall

    trainer.call = ModelCall.of(unwrapped(trainer.model))


def _mark_phases(trainer: Any, trace: Any, rows: list[list[tuple[int, int]]]) -> None:
    """Tell the trace where the steps begin and end; waits are counted in the last step only."""
    from transformers import TrainerCallback

    class EndOfStep(TrainerCallback):
        def on_log(self, *words: Any, **options: Any) -> None:
            if trace.phase != "start":
                trace.kept = trace.allocated
            trace.phase = "start"

    trainer.add_callback(EndOfStep())
    step, synchronise = trainer.training_step, trainer._synchronise_step

    def outside_rows(work: Any, *words: Any, **options: Any) -> Any:
        before = trace.phase
        trace.phase = "step" if before == "rows" else before
        try:
            return work(*words, **options)
        finally:
            trace.phase = before

    def training_step(model: Any, batch: Any, *more: Any) -> Any:
        if trainer.is_deepspeed_enabled and not rows:  # DeepSpeed steps inside the last backward
            trainer.model_wrapped.step = partial(outside_rows, trainer.model_wrapped.step)
        trace.collectives.append([])
        last = len(rows) == trainer.args.max_steps - 1
        trace.phase = "rows" if last else "start"
        rows.append([(sum(row.lengths), len(row.targets)) for row in batch.rows])
        try:
            return step(model, batch, *more)
        finally:
            trace.phase = "step" if last else "start"

    trainer.training_step, trainer._synchronise_step = training_step, partial(outside_rows, synchronise)
    trainer.loss_scale = partial(outside_rows, trainer.loss_scale)  # fp16 reads it once, before the first row


if __name__ == "__main__":
    main()
