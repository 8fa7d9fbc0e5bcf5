"""`watch`: shows the training of another process, or of another machine that shares the file system."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisft.console import console, display, redraws, say, warn
from minisft.errors import UserError
from minisft.monitoring.progress_table import ProgressTable, step_line
from minisft.monitoring.run_list import describe_best, run_scores
from minisft.monitoring.run_progress import MetricLines, is_at_work, number_of_steps
from minisft.recipe import Recipe
from minisft.run_folder import RunFolder, load_run

_POLL_SECONDS = 1.0
_START_SECONDS = 60.0  # the time that a training which is started together with `watch` has to begin
# A training on a machine whose locks cannot be seen here counts as ended after this many seconds without a change, or
# after so many times the duration of a logged step.
_QUIET_SECONDS, _QUIET_STEPS = 60.0, 20


class Watched:
    """A run, read again and again.

    Args:
        root: The run folder.
        clock: Returns the time in seconds since the epoch.

    Raises:
        UserError: It is not a run folder.
    """

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self.run, self._clock = RunFolder(root), clock
        self.recipe: Recipe = load_run(root)
        self.table = ProgressTable(f"training {root}")
        self.was_at_work = False
        self._began = clock()
        self._metrics = MetricLines(self.run.metrics)
        self._seen: dict[int, dict[str, Any]] = {}

    def read(self) -> list[dict[str, Any]]:
        """Read what is new into the table, and return the lines that were not returned before.

        Raises:
            UserError: The run was replaced by something that is no run.
        """
        replaced, lines = self._metrics.read_new()
        if replaced:
            self.recipe = load_run(self.run.root)
            self.table = ProgressTable(self.table.title)
        for line in lines:
            self.table.add(line)
        if lines:
            self.table.last_step = number_of_steps(self.recipe, lines[-1])
        new = [line for line in lines if self._seen.get(line["step"]) != line]
        self._seen |= {line["step"]: line for line in lines}
        return new

    def is_running(self) -> bool:
        """Return whether a process is at work in the run folder, or may be about to begin.

        A trained run whose lock is held is being replaced by --force, or made longer.
        """
        at_work = is_at_work(self.run)
        if at_work or self.was_at_work:  # once its lock was seen, its end is seen too
            self.was_at_work = True
            return at_work
        now = self._clock()
        if self.run.is_trained():
            return False
        if not self.run.has_begun():
            return now - self._began < _START_SECONDS
        if not self.run.metrics.exists():
            return False
        pace = max((line["seconds"] for line in self._seen.values()), default=0.0)
        return now - self.run.metrics.stat().st_mtime < max(_QUIET_SECONDS, _QUIET_STEPS * pace)


def watch(root: Path, sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.time) -> bool:
    """Show a training until it ends: a table in a terminal, else a line for each logged step.

    Args:
        root: The run folder.
        sleep: Waits for so many seconds.
        clock: Returns the time in seconds since the epoch.

    Returns:
        Whether the run is trained; False: its process is gone, and a message says how to go on.

    Raises:
        UserError: It is not a run folder, or no training begins in it.
    """
    watched = Watched(root, clock)
    run, in_place = watched.run, redraws() and console.is_terminal
    with display(watched.table if in_place else None, keep=True) as shown:
        new = watched.read()[-1:]  # of the past, a line for the newest step
        idle = 0  # times in a row that nothing was at work: --force renames the folder, so once may be by chance
        while True:
            # before the files: otherwise both could change between the two
            idle = 0 if watched.is_running() else idle + 1
            new += watched.read()
            watched.table.score = _score(run) if in_place else ""
            if in_place:
                shown.body = watched.table
                shown.waiting_for = "" if new or watched.table.step else "waiting for the first step"
            for line in () if in_place else new:
                held_out = f"  held-out loss {line['eval_loss']:.4f}" if line.get("eval_loss") is not None else ""
                say(step_line(line, watched.table.last_step, watched.table.seconds_left) + held_out)
            if idle == 2 or (idle and run.is_trained()):
                break
            new = []
            sleep(_POLL_SECONDS)
    if run.is_trained():
        say(f"trained: {run.model}")
        return True
    if not run.has_begun():
        raise UserError(root, "no training is running here", f"start it: minisft train {run.recipe}")
    warn(_describe_end(watched))
    return False


def _score(run: RunFolder) -> str:
    """Return the score of the best checkpoint so far; "" where there is none, or the results are being written."""
    try:
        return describe_best(run_scores(run))
    except (UserError, KeyError, ValueError):  # it is being written
        return ""


def _describe_end(watched: Watched) -> str:
    run, table = watched.run, watched.table
    steps = f" of {table.last_step:,}" if table.last_step else ""
    checkpoints = run.list_checkpoints()
    kept = f"{checkpoints[-1].name} is complete" if checkpoints else "there is no checkpoint"
    return (
        f"{run.root}: the training ended at step {table.step:,}{steps} without finishing: no process is at work in it; "
        f"{kept}. To go on: minisft train {run.recipe} --resume"
    )
