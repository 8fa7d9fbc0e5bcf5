"""Checkpoints of a run: written atomically, pruned, and resumed from.

While a checkpoint is written the processes take part in collectives (gathers of ZeRO-3, DeepSpeed's barriers). If one
left them with an error, the others would wait for ever. So a failed write is recorded, the processes continue, and then
agree on whether all of it was written.
"""

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minisft.console import warn
from minisft.errors import UserError
from minisft.files import (
    WRITE_ERRNOS,
    apply_umask,
    read_json,
    remove_leftovers,
    write_atomically,
    write_folder_atomically,
)
from minisft.manifest import foreign_files, in_marked_folder, list_some, record_folder, record_scratch_folder
from minisft.recipe import TrainingRecipe
from minisft.replacement import unused_name
from minisft.results import read_results
from minisft.run_folder import RunFolder, list_checkpoints, read_metrics, step_of
from minisft.text import first_line
from minisft.training.held_out import EVAL_LOSS, EarlyStopping, is_due

METADATA = "written_by.json"
_STAGING = ".unfinished"
_REMOVED = ".removed-"
# Files that only resuming needs; for a 7B model they have several times the size of the model.
_STATES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "global_step*", "latest",
           "zero_to_*.py")  # fmt: skip


def staging_folder(folder: Path) -> Path:
    """Return the path at which a checkpoint is written before it is renamed to its name in `folder`."""
    return folder / _STAGING


def remove_unfinished(folder: Path) -> None:
    """Remove the folders that a killed process was writing or removing."""
    for path in (folder / _STAGING, *folder.glob(f"{_REMOVED}*")):
        if path.is_symlink():
            path.unlink()
        record_scratch_folder(path)
        shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush everything in a folder to the disk, so that it is complete after a power failure too.

    Raises:
        OSError: The disk refused a write that it had accepted before.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    with contextlib.suppress(OSError):  # some file systems support this for files only
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(unfinished: Path, final: Path) -> None:
    """Rename a completely written checkpoint to its name, replacing one of the same step."""
    if final.exists() and not remove_checkpoint(final):
        final.rename(unused_name(final, "kept"))
    record_folder(unfinished, final)
    unfinished.rename(final)
    with contextlib.suppress(OSError):
        _sync(final.parent)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def remove_checkpoint(checkpoint: Path) -> bool:
    """Remove a checkpoint; it is renamed first, so that no partly removed checkpoint is ever seen.

    Returns:
        Whether it was removed: one that holds files that MiniSFT did not write stays, and a warning names it.
    """
    foreign = foreign_files(checkpoint) if in_marked_folder(checkpoint) else []
    if foreign:
        warn(f"{checkpoint} is kept, since it holds files that MiniSFT did not write: {list_some(foreign)}")
        return False
    temporary = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
    record_scratch_folder(temporary)
    shutil.rmtree(temporary, ignore_errors=True)
    checkpoint.rename(temporary)
    shutil.rmtree(temporary)
    return True


def drop_optimizer_states(folder: Path, keep: Path) -> None:
    """Remove the files that only resuming needs from every checkpoint except `keep`."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint == keep:
            continue
        for pattern in _STATES:
            for path in checkpoint.glob(pattern):
                if not path.is_dir() or path.is_symlink():
                    path.unlink()
                elif not (in_marked_folder(path) and foreign_files(path)):
                    shutil.rmtree(path)


def prune(run: RunFolder, training: TrainingRecipe, early_stopping: EarlyStopping | None, newest: Path) -> None:
    """Remove the checkpoints and states that the recipe does not keep, once the checkpoint `newest` is complete."""
    if training.keep_optimizer == "newest":
        drop_optimizer_states(run.checkpoints, keep=newest)
    if training.keep_checkpoints is not None:
        prune_checkpoints(run, training.keep_checkpoints, early_stopping)


def prune_checkpoints(run: RunFolder, count: int, early_stopping: EarlyStopping | None = None) -> None:
    """Remove all checkpoints except the `count` newest and those that the run folder records as best."""
    kept = best_checkpoints(run, early_stopping)
    for checkpoint in run.list_checkpoints()[:-count]:
        if checkpoint.name not in kept:
            remove_checkpoint(checkpoint)


def best_checkpoints(run: RunFolder, early_stopping: EarlyStopping | None = None) -> set[str | None]:
    """Return the names of the checkpoint of the lowest held-out loss and of the evaluation's best, if known.

    Args:
        run: The run folder.
        early_stopping: What ends the run early; where that is a score, the checkpoint with the best one is added.
    """
    scores = read_results(run.root) or {"checkpoints": [], "best": None}
    # Held-out losses of training, by the name of the checkpoint of that step, if there is one.
    losses = {f"checkpoint-{line['step']}": line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line}
    losses = losses or {entry["checkpoint"]: entry["loss"] for entry in scores["checkpoints"]}
    there = {path.name for path in run.list_checkpoints()}
    known = [name for name, loss in losses.items() if name in there and loss is not None]
    best: set[str | None] = {scores["best"]}
    if known:
        best.add(min(known, key=losses.__getitem__))
    if early_stopping is not None and early_stopping.key != EVAL_LOSS and there:
        history = _trainer_state(run.list_checkpoints()[-1])["log_history"]
        values = {
            f"checkpoint-{entry['step']}": entry[early_stopping.key] for entry in history if early_stopping.key in entry
        }
        sign = -1 if early_stopping.higher_is_better else 1
        best.add(min((name for name in values if name in there), key=lambda name: sign * values[name], default=None))
    return best


def has_state(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds the state that resuming needs."""
    return (checkpoint / "optimizer.pt").exists() or bool(list(checkpoint.glob("global_step*")))


def latest_resumable(folder: Path) -> Path | None:
    """Return the newest checkpoint that still holds its optimizer state, or None."""
    resumable = [path for path in list_checkpoints(folder) if has_state(path)]
    return resumable[-1] if resumable else None


def write_metadata(checkpoint: Path, strategy: str, processes: int) -> None:
    """Write the layout of the optimizer state into a checkpoint."""
    (checkpoint / METADATA).write_text(json.dumps({"strategy": strategy, "processes": processes}), encoding="utf-8")


def read_metadata(checkpoint: Path) -> tuple[str, int]:
    """Return the strategy and the number of processes that wrote a checkpoint's optimizer state."""
    origin = read_json(checkpoint / METADATA, _without(checkpoint), strategy=str, processes=int)
    return str(origin["strategy"]), int(origin["processes"])


def _without(checkpoint: Path) -> str:
    return f"delete {checkpoint}: --resume continues from the checkpoint before it"


def is_last(checkpoint: Path, early_stopping: EarlyStopping | None = None, last: int | None = None) -> bool:
    """Return whether training ends with this checkpoint: at the step `last`, by default its own last step, or early."""
    state = _trainer_state(checkpoint)
    stopped_early = early_stopping is not None and early_stopping.ends(state["log_history"])
    return bool(state["global_step"] >= (last or state["max_steps"])) or stopped_early


def last_step(checkpoint: Path, training: TrainingRecipe) -> int:
    """Return the last step of a run that resumes from a checkpoint; the recipe may have become longer since."""
    state = _trainer_state(checkpoint)
    steps_of_epoch = round(state["global_step"] / state["epoch"])
    return training.max_steps or math.ceil(training.epochs * steps_of_epoch)


def is_due_for_score(checkpoint: Path, training: TrainingRecipe) -> bool:
    """Return whether early stopping by a score looks at a checkpoint: not at one where a run was merely interrupted."""
    state = _trainer_state(checkpoint)
    last, epoch_steps = last_step(checkpoint, training), round(state["global_step"] / state["epoch"])
    return is_due(state["global_step"], every=training.save_every, epoch_steps=epoch_steps, last=last)


def recorded_score(checkpoint: Path, key: str) -> float | None:
    """Return the score of a checkpoint that `record_score` wrote into it under a key; None: it has none."""
    step = step_of(checkpoint)
    return next((entry[key] for entry in _trainer_state(checkpoint)["log_history"]
                 if key in entry and entry["step"] == step), None)  # fmt: skip


def record_score(checkpoint: Path, entry: dict[str, Any]) -> None:
    """Add an entry to the log history that a checkpoint stores: a score that was computed after it was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    state["log_history"].append(entry)
    write_atomically(checkpoint / "trainer_state.json", json.dumps(state, indent=2, sort_keys=True) + "\n")


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    kinds: dict[str, Any] = {"global_step": int, "max_steps": int, "log_history": list}
    state: dict[str, Any] = read_json(checkpoint / "trainer_state.json", _without(checkpoint), **kinds)
    return state


def publish_final_model(run: RunFolder) -> None:
    """Make `model/` from the last checkpoint, complete or absent: the same model without the state for resuming.

    Raises:
        OSError: The file system refused a write, such as a full disk; nothing of it stays.
    """
    remove_leftovers(run.model)
    with write_folder_atomically(run.model) as temporary:
        copy_model(run.list_checkpoints()[-1], temporary)
        apply_umask(temporary)  # checkpoints of an earlier version lack it
        sync_folder(temporary)


_NOT_OF_MODEL = (*_STATES, METADATA, "trainer_state.json")


def is_of_model(name: str) -> bool:
    """Return whether a file of a checkpoint, by its path in it, is part of the model, and not only for resuming."""
    return not any(fnmatch(name.split("/")[0], pattern) for pattern in _NOT_OF_MODEL)


def copy_model(checkpoint: Path, folder: Path, ignore: Sequence[str] = ()) -> None:
    """Copy a checkpoint into a folder, without the files that only resuming needs and those that match `ignore`."""
    unneeded = shutil.ignore_patterns(*_NOT_OF_MODEL, *ignore)
    shutil.copytree(checkpoint, folder, ignore=unneeded, dirs_exist_ok=True)


_TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "write(): ")  # in torch.save's RuntimeErrors
_FIX = "free some space or repair the disk, then resume with --resume"


def is_write_failure(error: BaseException) -> bool:
    """Return whether an error is that of a file system that refused a write."""
    if isinstance(error, OSError):
        many = error.args[0] if error.args and isinstance(error.args[0], list) else []  # shutil.copytree's
        return error.errno in WRITE_ERRNOS or any(
            os.strerror(code) in str(one) for one in many for code in WRITE_ERRNOS
        )
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error) or "IoError" in str(error)
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITERS)


class WriteErrors:
    """Writes whose first error is recorded; later writes are skipped, since the checkpoint is incomplete anyway."""

    def __init__(self) -> None:
        self.failure: str | None = None

    def __call__(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `write`, and record an error of the file system."""
        with self:
            return write(*args, **kwargs) if self.failure is None else None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or not is_write_failure(error):
            return False
        self.failure = self.failure or reason_of(error)
        return True


@contextlib.contextmanager
def explain_failed_writes(folder: Path) -> Iterator[None]:
    """Turn an error of the file system inside the block into a UserError.

    TensorBoard writes in a thread, which dies with a traceback; its next write in the main thread raises the error.

    Raises:
        UserError: A write was refused.
    """
    told = threading.excepthook
    threading.excepthook = lambda died: None if died.exc_value and is_write_failure(died.exc_value) else told(died)
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_failure(error):
            raise
        raise write_error(folder, "writing failed", reason_of(error)) from None
    finally:
        threading.excepthook = told


def write_error(where: Path, problem: str, reason: str) -> UserError:
    """Return the error of a write at or below `where` that was refused for `reason`."""
    there = next(folder for folder in (where, *where.parents) if folder.exists())
    free = size_text(shutil.disk_usage(there).free)
    return UserError(where, f"{problem} ({reason}; {free} free); {checkpoints_left(where)}", _FIX)


def checkpoints_left(where: Path) -> str:
    """Return a sentence about the checkpoints of a failed run; `where` is its folder, or one or two levels below it."""
    found = (list_checkpoints(folder / "checkpoints") for folder in (where, *where.parents[:2]))
    checkpoints = next((some for some in found if some), [])
    if not checkpoints:
        return "no checkpoint was written yet"
    return f"the checkpoints written before are complete, the last of them {checkpoints[-1].name}"


def size_text(size: int) -> str:
    """Return a size in bytes as text."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"


def reason_of(error: BaseException) -> str:
    """Return the message of the file system, if the error has it."""
    text = str(error)
    known = next((os.strerror(code) for code in WRITE_ERRNOS if os.strerror(code) in text), None)
    if known is None and any(name in text for name in _TORCH_WRITERS):
        return "torch.save could not write all of it"
    return known or first_line(error)
