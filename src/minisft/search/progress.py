"""What is seen of a search: a line at each rung of each trial, in a terminal a table, and the verdict."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from minisft.console import Display, display, redraws, say
from minisft.metric_names import LOSS, metric_title
from minisft.monitoring.run_progress import MetricLines
from minisft.search.budget import RUNGS
from minisft.search.objective import number_text, objective_text
from minisft.search.trial_pool import Job
from minisft.text import duration

_REFRESH = 1.0  # seconds
_OTHER_LINES = 4  # of a terminal: beside the rows of the table


class SearchProgress:
    """The progress of a search.

    Args:
        output: Folder of the search.
        objective: Name of what the search optimizes.

    Attributes:
        total: What all trials cost at most, in full runs.
        done: What this process has trained, in full runs.
    """

    def __init__(self, output: Path, objective: str) -> None:
        self.output, self.objective = output, objective
        self.total = self.done = self._before = 0.0
        self._started = self._refreshed = time.monotonic()
        self._display: Display | None = None
        self._trials: Sequence[Mapping[str, Any]] = ()
        self._running: dict[int, tuple[MetricLines, int]] = {}

    def show(
        self,
        trials: Sequence[Mapping[str, Any]],
        jobs: Iterable[Job],
        rung: int,
        steps: Mapping[int, Sequence[int]],
    ) -> None:
        """Say which trials are trained to which rung."""
        self._trials = trials
        numbers = [job.trial for job in jobs if job.trial is not None]
        self._running = {
            number: (MetricLines(self.output / "trials" / str(number) / "metrics.jsonl"), steps[number][rung])
            for number in numbers
        }
        if numbers:
            listed = ", ".join(map(str, numbers))
            say(f"rung {RUNGS[rung]:g}: trial{'s' if len(numbers) > 1 else ''} {listed}")

    def reached(self, trial: Mapping[str, Any], fraction: float) -> None:
        """Print that a trial has reached a rung."""
        self._trials = [trial if one["number"] == trial["number"] else one for one in self._trials]
        left = self._seconds_left()
        say(
            f"  trial {trial['number']} ({settings_text(trial['settings'])}): step {trial['steps']}, "
            f"{metric_title(self.objective)} {objective_text(trial, self.objective)}"
            + ("" if left is None else f"; at most {duration(left)} left")
        )
        self.refresh(now=True)

    @contextlib.contextmanager
    def waiting(self, text: str = "training trials") -> Iterator[None]:
        """Show in a terminal the table of the trials, and below it what is being waited for."""
        with display(waiting_for=text) as self._display:
            yield
        self._display = None

    def refresh(self, now: bool = False) -> None:
        """Redraw the table in a terminal."""
        if self._display is None or not redraws() or not (now or time.monotonic() - self._refreshed > _REFRESH):
            return
        self._refreshed = time.monotonic()
        states = {}
        for number, (lines, last) in self._running.items():
            newest = lines.read_end()[-1:]
            if newest and newest[0]["step"] < last:
                states[number] = f"step {newest[0]['step']} of {last}"
        left = self._seconds_left()
        self._display.body = TrialTable(self._trials, self.objective, states)
        self._display.waiting_for = "training trials" + ("" if left is None else f"; at most {duration(left)} left")

    def print_verdict(self, result: Mapping[str, Any]) -> None:
        """Print the best settings, those that cannot be told apart from them, and the scores on the test rows."""
        best = result["best"]
        entry = result["trials"][best["number"]]
        say(
            f"best: trial {best['number']} ({settings_text(best['settings'])}), validation "
            f"{metric_title(self.objective)} {objective_text(entry, self.objective)}"
        )
        tied = result["indistinguishable"]
        if tied:
            named = "; ".join(f"{number} ({settings_text(result['trials'][number]['settings'])})" for number in tied)
            say(f"cannot be told apart from it: trial{'s' if len(tied) > 1 else ''} {named}")
        else:
            say("every other trial is worse by more than chance")
        for name, scores in (result["test"] or {}).items():
            if scores is not None:
                shown = [key for key in dict.fromkeys(("bleu", self.objective)) if key in scores and key != LOSS]
                more = "".join(f", {metric_title(key)} {number_text(scores[key]['score'], key)}" for key in shown)
                say(f"test, {name:<8}: loss {scores['loss']:.4f} [{scores['low']:.4f}, {scores['high']:.4f}]{more}")
        say(f"the winner's run: {self.output / best['run']}, ready to use; its recipe: {self.output / best['recipe']}")
        say(f"to train on the validation rows too, which is a second run: {self.output / best['recipe_all_data']}")

    def _seconds_left(self) -> float | None:
        if not self.done or not self.total:  # with a budget in time, the total is known after the first rung
            return None
        return max(0.0, self.total - self.done) * (time.monotonic() - self._started) / self.done


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as text, each key by its last part."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())


@dataclass(frozen=True)
class TrialTable:
    """The trials as a table that fits into the terminal: where they are too many, the newest of those that go on.

    Args:
        trials: Entries of search.json.
        objective: Name of what the search optimizes.
        states: What a trial under way is doing, by its number.
    """

    trials: Sequence[Mapping[str, Any]]
    objective: str
    states: Mapping[int, str]

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, pad_edge=False)
        for head in ("trial", "settings", "rung", f"{metric_title(self.objective)}, 95 % interval", "state"):
            # in a narrow terminal the settings are shortened first, since only their column may wrap
            table.add_column(head, no_wrap=head != "settings", overflow="ellipsis", min_width=5)
        # below the rows are what is being waited for and the cursor; above them the head
        shown = max(1, options.size.height - _OTHER_LINES)
        going_on = sorted(self.trials, key=lambda trial: (trial["state"] in ("pruned", "failed"), -trial["number"]))
        for trial in sorted(going_on[:shown], key=lambda trial: trial["number"]):
            rung = f"{trial['rungs'][-1]['fraction']:g}" if trial["rungs"] else ""
            state = self.states.get(trial["number"], trial["state"])
            cells = (
                str(trial["number"]),
                settings_text(trial["settings"]),
                rung,
                objective_text(trial, self.objective),
            )
            table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in (*cells, state)))
        yield table
        if len(self.trials) > shown:
            yield Text(
                f"and {len(self.trials) - shown} trials that are not shown here",
                "dim",
                no_wrap=True,
                overflow="ellipsis",
            )
