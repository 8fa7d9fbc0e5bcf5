"""Which models to score, and waiting for the data and checkpoints that a running training has yet to write."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from minisft.console import warn
from minisft.errors import UserError
from minisft.evaluation.result_files import has_results
from minisft.files import is_lock_held
from minisft.run_folder import RunFolder, list_checkpoints

_POLL_SECONDS = 5.0
_START_SECONDS = 60.0  # the time that a training started together with the evaluation has to lock its run folder


class TrainingMonitor:
    """The training that is running in a run folder, or is about to start.

    Args:
        run: The run folder.
        sleep: Waits for so many seconds.
    """

    def __init__(self, run: RunFolder, sleep: Callable[[float], object]) -> None:
        self.run, self.sleep = run, sleep
        self.began, self.waited = False, 0.0

    def is_running(self) -> bool:
        """Return False once training has ended, or if none starts in time."""
        locked = is_training_running(self.run)
        self.began = self.began or locked
        return locked or (not self.began and self.waited < _START_SECONDS)

    def wait(self) -> None:
        self.sleep(_POLL_SECONDS)
        self.waited += _POLL_SECONDS


def wait_for_data(run: RunFolder, sleep: Callable[[float], object] = time.sleep) -> None:
    """Wait until training has prepared the run's data.

    Args:
        run: The run folder.
        sleep: Waits for so many seconds.

    Raises:
        UserError: No training is running in the folder, or it ended without preparing data.
    """
    training = TrainingMonitor(run, sleep)
    while True:
        is_running = training.is_running()  # before the data: otherwise both could change between the two tests
        if (run.dataset / "ledger.json").is_file():
            return
        if not is_running:
            problem = "training ended before it prepared the data" if training.began else "no training is running here"
            raise UserError(run.root, problem, "start it: minisft train")
        if training.waited == 0:
            warn(f"waiting for the data of {run.root}")
        training.wait()


def models_to_score(
    run: RunFolder, base: Path, follow: bool, sleep: Callable[[float], object] = time.sleep
) -> Iterator[tuple[str, Path]]:
    """Yield (name, folder) of the base model, then of the checkpoints by number.

    Removed checkpoints that an earlier evaluation scored precede the existing ones.

    Args:
        run: The run folder.
        base: The base model's folder.
        follow: Also yield the checkpoints that a running training has yet to write.
        sleep: Waits for so many seconds.
    """
    yield "base", base
    scored = [folder for folder in list_checkpoints(run.root / "evaluation") if has_results(folder / "journal.jsonl")]
    removed = [path for folder in scored if not (path := run.checkpoints / folder.name).exists()]
    yield from ((path.name, path) for path in removed)
    seen: set[Path] = set(removed)
    training = TrainingMonitor(run, sleep)
    while True:
        # before the listing: otherwise training could write its last checkpoint between the two;
        # a training that died ends the wait too
        is_running = follow and training.is_running() and not run.is_trained()
        for checkpoint in run.list_checkpoints():
            if checkpoint not in seen:
                seen.add(checkpoint)
                yield checkpoint.name, checkpoint
        if not is_running:
            return
        training.wait()


def is_training_running(run: RunFolder) -> bool:
    """Return whether training is running in the run folder."""
    return is_lock_held(run.root / ".lock")
