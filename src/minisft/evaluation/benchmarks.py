"""Benchmarks by lm-evaluation-harness: its tasks, or YAML files of one's own, on the base model and every checkpoint.

The harness computes all figures; it gets the model that the rest of the evaluation gets. Figures are kept in
`<output>/evaluation/NAME/benchmarks.json`, and not computed twice for the same weights, task and harness.
"""

import contextlib
import gc
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minisft.console import console, say, waiting
from minisft.errors import UserError
from minisft.evaluation.backends import ModelSpec
from minisft.evaluation.placement import load_for_inference
from minisft.evaluation.score_tables import fitting_columns
from minisft.files import write_atomically
from minisft.models import load_tokenizer, weights_fingerprint
from minisft.optional_packages import require_package
from minisft.results import benchmark_rows
from minisft.text import dump_json, first_line

WHERE = "evaluation.benchmarks"

# By task, then by metric: "score", "stderr" and "higher_is_better", each None where the harness does not say it.
Figures = dict[str, dict[str, dict[str, Any]]]


def require_harness() -> Any:
    """Return the package lm_eval.

    Raises:
        UserError: It is not installed.
    """
    require_package(WHERE, "lm_eval")
    import lm_eval

    return lm_eval


def load_tasks(tasks: Sequence[str]) -> "list[LoadedTask]":
    """Return the tasks with their data, before any model is scored.

    Args:
        tasks: Names of tasks of the harness, or paths of YAML files of tasks.

    Raises:
        UserError: The harness is not installed, there is no such task, or its data cannot be loaded.
    """
    if tasks:
        require_harness()
    return [LoadedTask(task) for task in tasks]


def run_benchmarks(
    tasks: "Sequence[LoadedTask]", models: Mapping[str, Path], spec: ModelSpec, batch_size: int, folder: Path
) -> dict[str, Any]:
    """Run the tasks on all models.

    Args:
        tasks: From `load_tasks`.
        models: The weights by name, the base model first; it has the tokenizer.
        spec: Dtype and consent for loading the models.
        batch_size: Requests of a batch.
        folder: `<output>/evaluation`.

    Returns:
        The key `benchmarks` of results.json: `harness` (its version) and `models`: by name, task and metric the
        `score`, its `stderr` and whether `higher_is_better`, and for a checkpoint the `difference` to the base model
        and its standard error.
    """
    figures = {
        name: _figures(tasks, name, weights, models, spec, batch_size, folder) for name, weights in models.items()
    }
    base = figures[next(iter(models))]
    for name in list(models)[1:]:
        for task, metrics in figures[name].items():
            for metric, entry in metrics.items():
                entry |= _difference(entry, base[task][metric])
    return {"harness": version("lm_eval"), "models": figures}


def print_benchmarks(benchmarks: Mapping[str, Any]) -> None:
    """Print a row for each task and metric, a column for each model, with the difference to the base model.

    Models that do not fit beside each other have a further table.
    """
    heads, rows = benchmark_rows(benchmarks)
    say(f"Benchmarks by lm-evaluation-harness {benchmarks['harness']}: score ± standard error, difference to base")
    first, *widths = (max(map(len, column)) for column in zip(heads, *rows, strict=True))
    for part in fitting_columns(first, widths):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for head in heads[1:][part]:
            table.add_column(Text(head), justify="right", no_wrap=True)
        for name, *cells in rows:
            table.add_row(Text(name), *map(Text, cells[part]))
        console.print(table)


class LoadedTask:
    """A task with its data.

    Args:
        given: Name of a task of the harness, or path of a YAML file.
    """

    def __init__(self, given: str) -> None:
        self.given = given
        path = Path(given)
        is_file = path.suffix in (".yaml", ".yml")
        if is_file and not path.is_file():
            raise UserError(WHERE, f"there is no file {given}", "give the path of a task's YAML file")
        from lm_eval.tasks import TaskManager

        with contextlib.redirect_stdout(sys.stderr), waiting(f"loading the task {given}"), _no_progress_bars():
            try:
                manager = TaskManager(include_path=str(path.parent)) if is_file else TaskManager()
                self.name = _task_name(path) if is_file else given
                if not is_file and given not in manager.all_tasks:
                    raise UserError(WHERE, f"lm-evaluation-harness has no task {given!r}", "lm_eval ls tasks lists all")
                self.tasks = manager.load([self.name])
            except UserError:
                raise
            except Exception as error:  # what a task needs can fail in any way: files, connections, its own code
                problem = f"the task {given} cannot be loaded ({type(error).__name__}: {first_line(error)})"
                fix = (
                    "if its data must be downloaded, load it once on a machine with a connection and copy the cache of "
                    "Hugging Face (HF_HOME), or use a YAML file whose dataset_path is json, with data_files of your own"
                )
                raise UserError(WHERE, problem, fix) from None
        self.manager = manager

    @property
    def fingerprint(self) -> str:
        """A hash of the task's name, of the files beside its YAML file, and of the harness."""
        path = Path(self.given)
        files = sorted(one for one in path.parent.glob("*") if one.is_file()) if path.is_file() else []
        hashes = [hashlib.sha256(one.read_bytes()).hexdigest() for one in files]
        return hashlib.sha256(json.dumps([self.given, hashes, version("lm_eval")]).encode()).hexdigest()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off the progress bars of `datasets`, which would mix with what this command prints."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _task_name(path: Path) -> str:
    """Return the name that a task's YAML file gives it; its own tags, such as `!function`, are not run for that."""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in ("task", "group") and value.strip():
            return value.strip().strip("\"'")
    raise UserError(path, "this file names no task", "add `task: NAME`")


def _figures(
    tasks: Sequence[LoadedTask],
    name: str,
    weights: Path,
    models: Mapping[str, Path],
    spec: ModelSpec,
    batch_size: int,
    folder: Path,
) -> Figures:
    """Return the figures of one model; only tasks that are not in its file are run."""
    path = folder / name / "benchmarks.json"
    fingerprint = weights_fingerprint(weights)
    keys = {task.given: f"{fingerprint} {spec.dtype} {task.fingerprint}" for task in tasks}
    try:
        kept = json.loads(path.read_bytes())
        kept = {key: kept[key] for key in keys.values() if key in kept}
    except (OSError, ValueError, TypeError):
        kept = {}
    missing = [task for task in tasks if keys[task.given] not in kept]
    if missing:
        from lm_eval.models.huggingface import HFLM

        base = next(iter(models.values()))
        with waiting(f"{name}: loading the model"):
            model = load_for_inference(weights, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code, base=base)
        tokenizer = load_tokenizer(base, spec.trust_remote_code)
        harnessed = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        for task in missing:
            with waiting(f"{name}: {task.given}"):
                kept[keys[task.given]] = _run_task(task, harnessed)
            write_atomically(path, dump_json(kept) + "\n")
        del model, harnessed
        gc.collect()
    return {task: metrics for key in keys.values() for task, metrics in kept[key].items()}


def _run_task(task: LoadedTask, model: Any) -> Figures:
    with contextlib.redirect_stdout(sys.stderr):
        found = require_harness().simple_evaluate(
            model, tasks=[task.name], task_manager=task.manager, log_samples=False, verbosity="ERROR"
        )
    figures: Figures = {}
    for name, values in found["results"].items():
        for key, score in values.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            figures.setdefault(name, {})[metric if chosen == "none" else key] = {
                "score": float(score),
                "stderr": float(stderr) if known else None,
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            }
    return figures


def _difference(entry: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the difference to the base model; its standard error is that of independent samples, so not too small."""
    known = entry["stderr"] is not None and base["stderr"] is not None
    stderr = math.hypot(entry["stderr"], base["stderr"]) if known else None
    return {"difference": entry["score"] - base["score"], "difference_stderr": stderr}
