"""Checkpoints of a run: whole or absent, plain model folders, and the newest also fit to resume from."""

import re
import shutil
from pathlib import Path

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What only resuming needs; for a 7B model it is several times the size of the model itself.
_STATES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "global_step*", "latest",
           "zero_to_*.py")  # fmt: skip


def publish(staged: Path, final: Path) -> None:
    """Give a completely written checkpoint its name, replacing one of the same step."""
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    shutil.rmtree(staged.parent, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is no checkpoint folder"
    return int(match[1])


def drop_optimizer_states(folder: Path, keep: Path) -> None:
    """Remove what only resuming needs from every checkpoint but `keep`."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint == keep:
            continue
        for pattern in _STATES:
            for path in checkpoint.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def latest_resumable(folder: Path) -> Path | None:
    """Return the newest checkpoint that still holds its optimizer state, or None."""
    resumable = [
        path for path in list_checkpoints(folder) if (path / "optimizer.pt").exists() or list(path.glob("global_step*"))
    ]
    return resumable[-1] if resumable else None
