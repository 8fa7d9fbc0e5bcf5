"""Which models are to be scored, and waiting for checkpoints that a running training has yet to write."""

import time
from collections.abc import Iterator
from pathlib import Path

from minisft.console import warn
from minisft.errors import UserError
from minisft.evaluation.result_files import holds_anything
from minisft.files import is_held
from minisft.run_folder import RunFolder, list_checkpoints

_POLL_SECONDS = 5.0
_START_SECONDS = 60.0  # the time that a training started beside the evaluation has to lock its run folder


class _Training:
    """The training that is at work in a run folder, or will be in a moment."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.began, self.waited = run, False, 0.0

    def goes_on(self) -> bool:
        """False once it has ended, or where none begins in time."""
        locked = is_locked(self.run)
        self.began = self.began or locked
        return locked or (not self.began and self.waited < _START_SECONDS)

    def wait(self) -> None:
        time.sleep(_POLL_SECONDS)
        self.waited += _POLL_SECONDS


def wait_for_data(run: RunFolder) -> None:
    """Wait until training has prepared the run's data.

    Raises:
        UserError: no training is at work in the folder, or it ended without preparing any.
    """
    training = _Training(run)
    while True:
        goes_on = training.goes_on()  # looked at before the data, so that none comes after
        if (run.dataset / "ledger.json").is_file():
            return
        if not goes_on:
            what = "training ended before it prepared the data" if training.began else "no training is at work here"
            raise UserError(run.root, what, "start it: minisft train")
        if training.waited == 0:
            warn(f"waiting for the data of {run.root}")
        training.wait()


def models_to_score(run: RunFolder, base: Path, follow: bool) -> Iterator[tuple[str, Path]]:
    """The base model, then the checkpoints by number; under `follow` also those still to come.

    Those that are gone but were examined come before those that are there.
    """
    yield "base", base
    gone = [path for path in _examined(run) if not path.exists()]
    yield from ((path.name, path) for path in gone)
    seen: set[Path] = set(gone)
    training = _Training(run)
    while True:
        # looked at before listing, so that nothing comes after; training that died ends the wait too
        goes_on = follow and training.goes_on() and not run.is_trained()
        for checkpoint in run.list_checkpoints():
            if checkpoint not in seen:
                seen.add(checkpoint)
                yield checkpoint.name, checkpoint
        if not goes_on:
            return
        training.wait()


def _examined(run: RunFolder) -> list[Path]:
    """The checkpoints, by number, that an earlier evaluation has computed something for."""
    folders = list_checkpoints(run.root / "evaluation")
    return [run.checkpoints / folder.name for folder in folders if holds_anything(folder / "journal.jsonl")]


def is_locked(run: RunFolder) -> bool:
    """Whether training is at work in the run folder."""
    return is_held(run.root / ".lock")
