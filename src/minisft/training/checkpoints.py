"""Checkpoints of a run: whole or absent, plain model folders, and the newest also fit to resume from."""

import json
import shutil
from pathlib import Path

from minisft.errors import UserError
from minisft.runs import RunFolder, list_checkpoints

_ORIGIN = "written_by.json"
# What only resuming needs; for a 7B model it is several times the size of the model itself.
_STATES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "global_step*", "latest",
           "zero_to_*.py")  # fmt: skip


def publish(staged: Path, final: Path) -> None:
    """Give a completely written checkpoint its name, replacing one of the same step."""
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    shutil.rmtree(staged.parent, ignore_errors=True)


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


def note_origin(checkpoint: Path, strategy: str, processes: int) -> None:
    """Write into a checkpoint how its optimizer state is laid out."""
    (checkpoint / _ORIGIN).write_text(json.dumps({"strategy": strategy, "processes": processes}), encoding="utf-8")


def strategy_of(checkpoint: Path) -> str:
    """Return the strategy that wrote a checkpoint's optimizer state."""
    return str(json.loads((checkpoint / _ORIGIN).read_text(encoding="utf-8"))["strategy"])


def require_same_layout(checkpoint: Path, strategy: str, processes: int) -> None:
    """Refuse to resume an optimizer state under a strategy or a number of processes it is not laid out for.

    Vanilla keeps it whole, so there any number of processes can go on with it; DeepSpeed keeps shards, which its
    loader takes back as they were written only.

    Raises:
        UserError: naming what the checkpoint needs.
    """
    origin = json.loads((checkpoint / _ORIGIN).read_text(encoding="utf-8"))
    same = strategy == origin["strategy"] and (strategy == "vanilla" or processes == origin["processes"])
    if not same:
        raise UserError(
            checkpoint,
            f"its optimizer state is that of {origin['strategy']} on {origin['processes']} process(es), which "
            f"{strategy} on {processes} cannot take over",
            f"resume with training.strategy={origin['strategy']} training.processes={origin['processes']} and the "
            "batch_size it had",
        )


def is_last(checkpoint: Path) -> bool:
    """Say whether training was over with this checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def publish_final_model(run: RunFolder) -> None:
    """Make `model/` of the last checkpoint, whole or absent: the same model without what resuming needs."""
    aside = run.root / ".model"
    shutil.rmtree(aside, ignore_errors=True)
    copy_model(run.list_checkpoints()[-1], aside)
    shutil.rmtree(run.model, ignore_errors=True)
    aside.rename(run.model)


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint into a new or empty folder, without what only resuming needs."""
    unneeded = shutil.ignore_patterns(*_STATES, _ORIGIN, "trainer_state.json")
    shutil.copytree(checkpoint, folder, ignore=unneeded, dirs_exist_ok=True)
