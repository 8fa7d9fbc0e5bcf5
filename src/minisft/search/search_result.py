"""The content of search.json: what is known of a search, from its trials."""

import json
from pathlib import Path
from typing import Any

from minisft.files import write_atomically
from minisft.search.budget import RUNGS
from minisft.search.statistics import estimate
from minisft.search.trials import Trials, training_seconds

RESULT = "search.json"


def write_result(trials: Trials, test: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write search.json, complete or not at all, and return its content.

    Args:
        trials: The trials.
        test: The scores on the test rows, at the end.
    """
    result = search_result(trials, test)
    write_atomically(trials.output / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def read_result(output: Path) -> dict[str, Any]:
    """Return the content of search.json in the folder of a search; {} if there is none."""
    path = output / RESULT
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def search_result(trials: Trials, test: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of search.json; the arguments are those of `write_result`."""
    found = trials.best_and_ties()
    best = None
    if found is not None:
        best = {
            "number": found[0],
            "settings": trials.study.settings[found[0]],
            "run": f"trials/{found[0]}",
            "recipe": "best.yaml",
            "recipe_all_data": "best_all_data.yaml",
        }
    return {
        "objective": trials.objective.key,
        "higher_is_better": trials.objective.higher_is_better,
        "rungs": list(RUNGS),
        "vary": [str(axis) for axis in trials.axes],
        "validation_rows": next((len(reached[0]) for reached in trials.scores.values() if reached), None),
        "trials": trial_entries(trials),
        "best": best,
        "indistinguishable": found[1] if found is not None else [],
        "importance": trials.study.importance() if found is not None else {},
        "test": test,
    }


def trial_entries(trials: Trials) -> list[dict[str, Any]]:
    """Return the field `trials` of search.json: an entry for each trial."""
    return [_entry(trials, number) for number in range(len(trials))]


def _entry(trials: Trials, number: int) -> dict[str, Any]:
    rungs = []
    for rung, rows in enumerate(trials.scores.get(number, [])):
        found = estimate(rows, trials.seed)
        step = trials.steps[number][rung]
        rungs.append(
            {"fraction": RUNGS[rung], "step": step, "objective": found.value, "low": found.low, "high": found.high}
        )
    last: dict[str, Any] = rungs[-1] if rungs else {}
    state = "failed" if number in trials.failed else "pruned" if number in trials.stopped else "running"
    if state == "running" and len(rungs) == len(RUNGS):
        state = "complete"
    entry = {
        "number": number,
        "settings": trials.study.settings[number],
        "state": state,
        "steps": last.get("step", 0),
        "objective": last.get("objective"),
        "low": last.get("low"),
        "high": last.get("high"),
        "run": f"trials/{number}",
        "rungs": rungs,
        "seconds": training_seconds(trials.run(number), last.get("step", 0)),
    }
    if number in trials.failed:
        entry["error"] = trials.failed[number]
    if number in trials.stopped:
        entry["stopped"] = trials.stopped[number]
    return entry
