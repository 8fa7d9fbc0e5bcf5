"""Which models are to be scored, and waiting for checkpoints that a running training has yet to write."""

import time
from collections.abc import Iterator
from pathlib import Path

from minisft.console import warn
from minisft.errors import UserError
from minisft.evaluation.result_files import has_results
from minisft.files import is_lock_held
from minisft.run_folder import RunFolder, list_checkpoints

_POLL_SECONDS = 5.0
_START_SECONDS = 60.0  # the time that a training started beside the evaluation has to lock its run folder


class TrainingMonitor:
    """The training that is at work in a run folder, or will be in a moment."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.began, self.waited = run, False, 0.0

    def is_running(self) -> bool:
        """False once it has ended, or where none begins in time."""
        locked = is_training_running(self.run)
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
    training = TrainingMonitor(run)
    while True:
        is_running = training.is_running()  # looked at before the data, so that none comes after
        if (run.dataset / "ledger.json").is_file():
            return
        if not is_running:
            problem = "training ended before it prepared the data" if training.began else "no training is at work here"
            raise UserError(run.root, problem, "start it: minisft train")
        if training.waited == 0:
            warn(f"waiting for the data of {run.root}")
        training.wait()


def models_to_score(run: RunFolder, base: Path, follow: bool) -> Iterator[tuple[str, Path]]:
    """The base model, then the checkpoints by number; under `follow` also those still to come.

    Those that are gone but were examined come before those that are there.
    """
    yield "base", base
    gone = [path for path in _previously_scored(run) if not path.exists()]
    yield from ((path.name, path) for path in gone)
    seen: set[Path] = set(gone)
    training = TrainingMonitor(run)
    while True:
        # looked at before listing, so that nothing comes after; training that died ends the wait too
        is_running = follow and training.is_running() and not run.is_trained()
        for checkpoint in run.list_checkpoints():
            if checkpoint not in seen:
                seen.add(checkpoint)
                yield checkpoint.name, checkpoint
        if not is_running:
            return
        training.wait()


def _previously_scored(run: RunFolder) -> list[Path]:
    """The checkpoints, by number, that an earlier evaluation has computed something for."""
    folders = list_checkpoints(run.root / "evaluation")
    return [run.checkpoints / folder.name for folder in folders if has_results(folder / "journal.jsonl")]


def is_training_running(run: RunFolder) -> bool:
    """Whether training is at work in the run folder."""
    return is_lock_held(run.root / ".lock")
