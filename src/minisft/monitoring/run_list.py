"""The runs below a folder: their state, steps, scores and size, read from the run folders alone."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minisft.errors import UserError
from minisft.manifest import MARKER, read_marker
from minisft.metric_names import METRIC_NAMES, metric_title
from minisft.monitoring.run_progress import MetricLines, is_at_work, number_of_steps
from minisft.recipe import Recipe
from minisft.results import chosen_by, is_reliable, read_results, score_of
from minisft.run_folder import RUN_KIND, RunFolder, load_run
from minisft.text import first_line, printable

if TYPE_CHECKING:
    from rich.table import Table

State = Literal[
    "unprepared", "preparing", "prepared", "training", "stopped", "trained", "evaluated", "replaced", "broken"
]
_MOST_DEPTH = 4  # levels of folders that are searched for runs
_INNER = ("compare",)  # folders of a run that may hold runs
_REPLACED = re.compile(r"\.old-\d+$")
# Files that make a folder a run, although it may be a broken one.
_RUN_FILES = ("recipe.yaml", "metrics.jsonl", "checkpoints")


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Args:
        folder: Path of the run folder.
        state: "unprepared": only its recipe is there; "preparing": a command is at work, before the first step;
            "prepared": its data is there; "training"; "stopped": trained in part, and nothing is at work in it;
            "trained"; "evaluated": trained and scored; "replaced": kept until the run that replaces it has taken a
            step; "broken": `reason` says why.
        reason: Why the run is broken; "" otherwise.
        step: Number of the newest logged step; None: none yet.
        steps: Number of the last step; None: not known yet.
        loss: Loss of the newest logged step, in nats per supervised token.
        eval_loss: Newest loss on the held-out rows that was logged during training.
        checkpoint: Name of the newest checkpoint, from which `--resume` continues.
        best: Name of the best checkpoint, by `metric`.
        metric: Metric that chose the best checkpoint: "bleu" or "chrf".
        score: Score of the best checkpoint, from 0 to 100.
        base_score: Score of the base model, from 0 to 100.
        reliable: Whether there are enough held-out conversations for a claim about the scores.
        bytes: Size of all files in the folder.
        changed: Time of the newest change of a file, as ISO 8601 in UTC.
    """

    folder: str
    state: State
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    checkpoint: str | None = None
    best: str | None = None
    metric: str | None = None
    score: float | None = None
    base_score: float | None = None
    reliable: bool | None = None
    bytes: int = 0
    changed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in a folder and in the folders below it, those that changed last at the end.

    Raises:
        UserError: There is no such folder, or it cannot be read.
    """
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        problem = "there is no such folder" if isinstance(error, FileNotFoundError) else os.strerror(error.errno or 0)
        raise UserError(folder, problem, "name the folder of your runs: minisft runs FOLDER") from None
    runs = [_summarise(RunFolder(root)) for root in find_runs(folder)]
    return sorted(runs, key=lambda run: (run.changed or "", run.folder))


def find_runs(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Yield the run folders in `folder`, broken ones too, and `folder` itself if it is one; links are not followed."""
    try:
        is_run = _looks_like_run(folder)
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        yield folder  # its summary gives the reason
        return
    if is_run:
        yield folder
    for path in below:
        if depth < _MOST_DEPTH and not path.name.startswith(".") and (not is_run or path.name in _INNER):
            yield from find_runs(path, depth + 1)


def _looks_like_run(folder: Path) -> bool:
    if (folder / MARKER).is_file():
        marker = read_marker(folder)
        if marker is not None:
            return marker.kind == RUN_KIND and (folder / "recipe.yaml").exists()
    return RunFolder(folder).is_run() or sum((folder / name).exists() for name in _RUN_FILES) > 1


def _summarise(run: RunFolder) -> RunSummary:
    size, changed = _size_and_change(run.root)
    about: dict[str, Any] = {"folder": str(run.root), "bytes": size, "changed": changed}
    try:
        recipe = load_run(run.root)
        return RunSummary(state=_state(run), **about, **_progress(run, recipe), **run_scores(run))
    except UserError as error:
        reason = f"{error.problem} ({error.where})"
    except OSError as error:
        reason = f"{os.strerror(error.errno) if error.errno else first_line(error)} ({error.filename or run.root})"
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:  # a file of another form than MiniSFT writes
        reason = f"a file in it has an unknown form ({type(error).__name__}: {first_line(error)})"
    return RunSummary(state="broken", reason=reason, **about)


def _state(run: RunFolder) -> State:
    at_work = is_at_work(run)
    if at_work and _REPLACED.search(run.root.name):
        return "replaced"
    if at_work and not run.is_trained():
        return "training" if run.has_begun() else "preparing"
    if run.is_trained():
        return "trained" if read_results(run.root) is None else "evaluated"
    if run.has_begun():
        return "stopped"
    return "prepared" if (run.dataset / "ledger.json").is_file() else "unprepared"


def _progress(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a run's steps."""
    lines = MetricLines(run.metrics).read_end()
    newest = lines[-1] if lines else {}
    checkpoints = run.list_checkpoints()
    held_out = [line["eval_loss"] for line in lines if isinstance(line.get("eval_loss"), int | float)]
    return {
        "step": newest.get("step"),
        "steps": number_of_steps(recipe, newest),
        "loss": newest.get("loss"),
        "eval_loss": held_out[-1] if held_out else None,
        "checkpoint": checkpoints[-1].name if checkpoints else None,
    }


def run_scores(run: RunFolder) -> dict[str, Any]:
    """Return the fields of a run's best checkpoint; {} if it is not scored.

    Raises:
        UserError: results.json is damaged.
        KeyError, ValueError: results.json has another form than MiniSFT writes.
    """
    results = read_results(run.root)
    if results is None or results["best"] is None:
        return {}
    [best] = [entry for entry in results["checkpoints"] if entry["checkpoint"] == results["best"]]
    metric, _ = chosen_by(results)
    return {
        "best": results["best"],
        "metric": metric,
        "score": score_of(best, metric),
        "base_score": score_of(results["base"], metric),
        "reliable": is_reliable(results),
    }


def _size_and_change(folder: Path) -> tuple[int, str | None]:
    """Return the size of the files in a folder in bytes, and when the newest of them changed; links are not followed.

    What cannot be read, or is deleted meanwhile, does not count.
    """
    size, newest = 0, None
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(parent, name))  # noqa: PTH118 (a run may have thousands of files)
            except OSError:
                continue
            size += stat.st_size
            newest = max(newest or 0.0, stat.st_mtime)
    if newest is None:
        return size, None
    return size, datetime.fromtimestamp(newest, timezone.utc).isoformat(timespec="seconds")


# --- the table --------------------------------------------------------------------------------------------

_COLUMNS = ("run", "state", "step", "loss", "best", "size", "changed")
_LESS_IMPORTANT = ("size", "loss", "changed")  # left out in this order where a terminal is too narrow
_NAME_WIDTH = 12  # characters
_STYLES = {"training": "green", "preparing": "green", "stopped": "yellow", "broken": "red"}


def show_runs(runs: list[RunSummary], folder: Path) -> None:
    """Print a table of runs in `folder`, with the reasons of broken ones below it."""
    from minisft.console import console, say

    if not runs:
        say(f"There are no runs in {folder}.")
        return
    columns = list(_COLUMNS)
    table = _make_table(runs, folder, columns)
    if console.is_terminal:
        for name in _LESS_IMPORTANT:
            if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
                break
            columns.remove(name)
            table = _make_table(runs, folder, columns)
        console.print(table)
    else:  # a pipe or a file has any width
        unlimited = console.options.update(max_width=10_000)
        console.print(table, width=console.measure(table, options=unlimited).maximum)
    for run in runs:
        if run.reason:
            say(f"{_name(run, folder)}: {run.reason}")


def _make_table(runs: list[RunSummary], folder: Path, columns: list[str]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in ("run", "state", "best") else "right",
            overflow="fold",
            no_wrap=name != "run",
            min_width=_NAME_WIDTH if name == "run" else None,
        )
    for run in runs:
        cells = {
            "run": _name(run, folder),
            "state": run.state,
            "step": _steps(run),
            "loss": "" if run.loss is None else f"{run.loss:.4f}",
            "best": describe_best(run.as_dict()),
            "size": _size(run.bytes),
            "changed": "" if run.changed is None else _age(run.changed),
        }
        table.add_row(*(Text(cells[name]) for name in columns), style=_STYLES.get(run.state, ""))
    return table


def _name(run: RunSummary, folder: Path) -> str:
    path = Path(run.folder)
    return printable(str(path.relative_to(folder) if path != folder else folder))


def _steps(run: RunSummary) -> str:
    if run.step is None:
        return ""
    return f"{run.step:,}" + ("" if run.steps is None else f" of {run.steps:,}")


def describe_best(scores: Mapping[str, Any]) -> str:
    """Return the score of the best checkpoint from the fields of a `RunSummary`; "" if there is none."""
    if scores.get("score") is None:
        return ""
    metric = scores["metric"]
    digits = ".1f" if metric in METRIC_NAMES else ".4g"
    base = "none" if scores["base_score"] is None else format(scores["base_score"], digits)
    return f"{metric_title(metric)} {scores['score']:{digits}} (base {base})"


def _size(size: int) -> str:
    for unit, bytes_of_unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_of_unit:
            return f"{size / bytes_of_unit:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def _age(changed: str) -> str:
    seconds = max(0.0, (datetime.now(timezone.utc) - datetime.fromisoformat(changed)).total_seconds())
    for unit, seconds_of_unit in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= seconds_of_unit:
            return f"{seconds // seconds_of_unit:.0f} {unit} ago"
    return "now"
