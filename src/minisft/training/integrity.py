"""Integrity of checkpoints: every file exists and can be read, and no pickle can run code.

A pickle is a program, and a run folder can come from an untrusted source. torch's `weights_only=True` reads only
tensors and plain containers; the other classes in these files are listed in `zero` (DeepSpeed's) and in transformers
(numpy's).
"""

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minisft.errors import UserError
from minisft.run_folder import list_checkpoints
from minisft.text import first_line
from minisft.training.checkpoints import METADATA, has_state, read_metadata

_CLASS = re.compile(r"GLOBAL ([\w.]+)")  # how torch names an object that it refuses


@contextlib.contextmanager
def forbid_pickled_code(checkpoint: Path) -> Iterator[None]:
    """Turn torch's refusal to read anything but plain state, inside the block, into a UserError.

    Raises:
        UserError: A file of the checkpoint holds an object that could run code, or is not a complete pickle.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        named = _CLASS.search(str(error))
        problem = (
            f"its training state holds objects that could run code ({named[1]}): none of it was run"
            if named
            else "its training state cannot be read as tensors and numbers: it is damaged, or holds objects that could "
            "run code, and none of it was run"
        )
        fix = "delete this checkpoint, and resume from an earlier one or train again; do not trust where it came from"
        raise UserError(checkpoint, problem, fix) from None


_NEEDED = ("trainer_state.json", "scheduler.pt", METADATA)
_KEYS = {
    "trainer_state.json": ("global_step", "max_steps", "epoch", "log_history"),
    METADATA: ("strategy", "processes"),
}
_ARCHIVES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "global_step*/*.pt")  # of torch.save
_WEIGHTS = "*.safetensors"
# Parts of the RuntimeErrors of torch.load for an archive whose content is not what its directory says.
_TORCH_READERS = ("PytorchStreamReader", "zip archive", "storage has wrong")


def require_intact(checkpoint: Path) -> None:
    """Check that every file that resuming reads exists and is not truncated, without reading all of it.

    Raises:
        UserError: A file is missing or damaged; the message names it.
    """
    for name in _NEEDED:
        if not (checkpoint / name).is_file():
            raise damaged(checkpoint, f"{name} is missing")
    for path in _each(checkpoint, tuple(_KEYS)):
        with _explain(checkpoint, path):
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not set(_KEYS[path.name]) <= set(found):
                raise ValueError(f"it does not hold {', '.join(_KEYS[path.name])}")
    # DeepSpeed's folder has a file of each process; the file `latest` names that folder.
    for folder in checkpoint.glob("global_step*"):
        latest = checkpoint / "latest"
        if not latest.is_file() or latest.read_text(encoding="utf-8", errors="replace").strip() != folder.name:
            raise damaged(checkpoint, f"the file `latest` does not name {folder.name}")
        for rank in range(read_metadata(checkpoint)[1]):
            pattern = f"*zero_pp_rank_{rank}_mp_rank_*optim_states.pt"
            if not list(folder.glob(pattern)):
                raise damaged(checkpoint, f"{folder.name}/{pattern} is missing")
    for path in _each(checkpoint, _ARCHIVES):
        with _explain(checkpoint, path), zipfile.ZipFile(path):  # the directory of a zip archive is at its end
            pass
    for path in _each(checkpoint, (_WEIGHTS,)):
        with _explain(checkpoint, path), safe_open(path, "pt"):
            pass


@contextlib.contextmanager
def explain_damage(checkpoint: Path | str | None) -> Iterator[None]:
    """Turn an error of reading a checkpoint inside the block into a UserError."""
    try:
        yield
    except (EOFError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, json.JSONDecodeError) as error:
        raise _damaged_by(checkpoint, error) from None
    except RuntimeError as error:
        if not any(word in str(error) for word in _TORCH_READERS):
            raise
        raise _damaged_by(checkpoint, error) from None


def damaged(checkpoint: Path, problem: str) -> UserError:
    """Return the error of a damaged checkpoint, with the way to resume without it."""
    earlier = [path for path in list_checkpoints(checkpoint.parent) if path != checkpoint and has_state(path)]
    if earlier:
        fix = f"restore the file, or remove {checkpoint.name}: --resume then continues from {earlier[-1].name}"
    else:
        fix = "restore the file, or train again with --force: no other checkpoint holds an optimizer state"
    return UserError(checkpoint, f"this checkpoint is damaged: {problem}", fix)


def _damaged_by(checkpoint: Path | str | None, error: Exception) -> Exception:
    if checkpoint is None:
        return error
    if isinstance(error, pickle.UnpicklingError):  # torch's message is about trust
        return damaged(Path(checkpoint), "a file of its states does not hold what is expected in it")
    return damaged(Path(checkpoint), first_line(error))


@contextlib.contextmanager
def _explain(checkpoint: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, zipfile.BadZipFile, SafetensorError) as error:
        size = path.stat().st_size
        reason = first_line(error) if size else "it is empty"
        raise damaged(checkpoint, f"{path.relative_to(checkpoint)} cannot be read ({reason})") from None


def _each(checkpoint: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in checkpoint.glob(pattern) if path.is_file())
