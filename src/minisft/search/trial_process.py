"""The process that takes the steps of trials: `python -m minisft.search.trial_process`.

It imports torch once, reads one job a line from stdin, and carries each out in a fork of itself: importing takes as
long as many steps of a small model, and a trial that runs out of memory ends its fork only. A fork is as fresh as a new
process: no model was loaded and no GPU was used before it. The reply to a job is one line on stdout.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from minisft.errors import StoppedError, UserError
from minisft.processes import exit_with_parent, hard_exit

STOPPED = 3  # exit status of a job that saved its work because it was asked to stop
_child = 0  # process of the job under way


def main() -> None:
    """Carry out jobs until stdin ends."""
    exit_with_parent()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU must not open it before the fork
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    signal.signal(signal.SIGTERM, _forward)
    _import_libraries()
    for line in sys.stdin:
        replies.write(json.dumps(_perform_in_fork(json.loads(line))) + "\n")
        replies.flush()


def _forward(number: int, frame: FrameType | None) -> None:
    if _child:
        os.kill(_child, number)
    else:
        os._exit(0)


def _import_libraries() -> None:
    from minisft.training.device import on_cpu
    from minisft.training.zero import import_deepspeed, set_deepspeed_environment

    set_deepspeed_environment(on_cpu())
    import peft  # noqa: F401

    import minisft.data.inspect
    import minisft.data.preparation
    import minisft.evaluation.backends
    import minisft.report.plots
    import minisft.runner
    import minisft.training.certificate
    import minisft.training.disk
    import minisft.training.run_training
    import minisft.training.trainer  # noqa: F401

    if on_cpu():  # a GPU could be opened by it, which must not happen before a fork
        import_deepspeed()
    with contextlib.suppress(ImportError):
        import torch.utils.tensorboard  # noqa: F401 (the Trainer imports it, if it is installed)
    gc.collect()
    gc.freeze()  # a collection in a fork would visit, and so copy, all that was imported


def _perform_in_fork(job: dict[str, Any]) -> dict[str, Any]:
    """Carry out a job; return its exit status, minus the number of a signal that killed it, and its error."""
    global _child
    reading, writing = os.pipe()
    parent, _child = os.getpid(), os.fork()
    if _child == 0:
        exit_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(reading)
        hard_exit(_perform(job, writing))
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        error = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(_child, 0)[1])
    _child = 0
    if status < 0:
        name = signal.Signals(-status).name
        error = f"killed by {name}" + (": often too little memory" if status == -signal.SIGKILL else "")
    return {"status": status, "error": error}


def _perform(job: dict[str, Any], writing: int) -> int:
    """Carry out a job in this process, with its output in a log; write an error into the pipe `writing`."""
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["gpu"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job["gpu"]
    try:
        _JOBS[job["kind"]](job)
    except UserError as error:
        print(f"minisft: {error}", file=sys.stderr)
        os.write(writing, str(error).encode())
        return 2
    except (StoppedError, KeyboardInterrupt) as stop:
        print(f"minisft: {stop}", file=sys.stderr)
        return STOPPED
    except Exception as error:
        from minisft.models import is_out_of_memory
        from minisft.text import first_line

        traceback.print_exc()
        reason = f"{type(error).__name__}: {first_line(error)}"
        os.write(writing, (f"out of memory ({reason})" if is_out_of_memory(error) else reason).encode())
        return 1
    return 0


def _train(job: dict[str, Any]) -> None:
    """Train a trial to a step or to its end, and write the losses or the scores of its held-out rows there."""
    import time

    from minisft.data.prepared import load_split
    from minisft.models import resolve_model
    from minisft.run_folder import RunFolder, load_run, step_of
    from minisft.runner import train_run
    from minisft.search.objective import compute_score, write_score
    from minisft.search.rung_losses import compute_row_losses, write_losses
    from minisft.training.checkpoints import latest_resumable, remove_checkpoint

    run = RunFolder(Path(job["root"]))
    recipe = load_run(run.root, trust_remote_code=job["trust_remote_code"])
    step: int | None = job["step"]
    reached = latest_resumable(run.checkpoints)
    if not run.is_trained() and (step is None or reached is None or step_of(reached) < step):
        train_run(recipe, force=False, resume=run.has_begun(), pause_at=step, fingerprint=job["fingerprint"])
    if job["losses"] is None:
        return
    started = time.perf_counter()
    model = run.model if run.is_trained() else run.checkpoints / f"checkpoint-{step}"
    if job["metric"] is None:
        losses = compute_row_losses(
            model,
            load_split(run.root, "test"),
            precision=recipe.training.precision,
            trust_remote_code=recipe.trust_remote_code,
            base=resolve_model(recipe.model, recipe.trust_remote_code).folder,
        )
        if not bool((losses[0] < float("inf")).all()):
            problem = "the loss on the validation rows is not finite"
            raise UserError(model, problem, "lower training.learning_rate, or use precision fp32 or bf16")
    else:
        name = f"trial-{job['trial']}-{step_of(run.list_checkpoints()[-1]) if run.is_trained() else step}"
        score = compute_score(recipe, run.root, (name, model), job["metric"]["entry"], Path(job["answers"]))
    for extra in job["temporary_steps"] if run.is_trained() else ():  # the recipe itself would not have saved them
        checkpoint = run.checkpoints / f"checkpoint-{extra}"
        if checkpoint.is_dir() and checkpoint != run.list_checkpoints()[-1]:
            remove_checkpoint(checkpoint)
    # written last: that it exists says that the trial has reached its rung
    if job["metric"] is None:
        write_losses(Path(job["losses"]), losses, time.perf_counter() - started)
    else:
        write_score(Path(job["losses"]), score, time.perf_counter() - started)


def _score(job: dict[str, Any]) -> None:
    """Score models on the test rows, and write the losses of these rows for each."""
    from minisft.data.prepared import load_split
    from minisft.evaluation.run_evaluation import evaluate
    from minisft.models import resolve_model
    from minisft.run_folder import load_run
    from minisft.search.rung_losses import compute_row_losses, write_losses

    root = Path(job["root"])
    recipe = load_run(root, trust_remote_code=job["trust_remote_code"])
    base = resolve_model(recipe.model, recipe.trust_remote_code).folder
    models = {name: Path(folder) for name, folder in job["models"].items()}
    evaluate(recipe, root, others=models)
    rows = load_split(root, "test")
    for name, folder in {"base": base, **models}.items():
        losses = compute_row_losses(
            folder,
            rows,
            precision=recipe.training.precision,
            trust_remote_code=recipe.trust_remote_code,
            base=base,
        )
        write_losses(Path(job["losses"]) / f"test-{name.partition('-')[0]}.npz", losses, 0.0)


_JOBS = {"train": _train, "score": _score}

if __name__ == "__main__":
    main()
