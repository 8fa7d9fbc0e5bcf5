"""What the report knows of a run, read from its folder, and what the scripts of its page draw."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_json, read_json_lines
from minisft.report.html import rounded
from minisft.results import best_label, is_reliable, read_results
from minisft.run_folder import RunFolder, read_metrics

METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF"}


@dataclass(frozen=True)
class RunFiles:
    """The readable parts of a run folder.

    Args:
        root: the run folder.
        steps: the lines of metrics.jsonl.
        results: evaluation/results.json, or None.
        ledger: dataset/ledger.json, or None.
        recipe: the text of recipe.yaml, or "".
        preview: rows of dataset/preview.json.
        environment: environment.json, or None.
    """

    root: Path
    steps: list[dict[str, Any]]
    results: dict[str, Any] | None
    ledger: dict[str, Any] | None
    recipe: str
    preview: list[dict[str, Any]]
    environment: dict[str, Any] | None

    @property
    def systems(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, entry) of base and checkpoints."""
        if self.results is None:
            return []
        checkpoints = [(entry["checkpoint"], entry) for entry in self.results["checkpoints"]]
        return [("base", self.results["base"]), *checkpoints]

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(step, held-out loss): of every scored model, or as training computed it where none is scored yet."""
        scored = [(entry["step"], entry["loss"]) for _, entry in self.systems if entry.get("loss") is not None]
        return scored or [(line["step"], line["eval_loss"]) for line in self.steps if line.get("eval_loss") is not None]


def read_run(root: Path) -> RunFiles:
    """Read what there is of a run.

    Raises:
        UserError: the folder is no run, or a file of it is damaged.
    """
    if not (root / "recipe.yaml").is_file() and not (root / "metrics.jsonl").is_file():
        raise UserError(
            root, "this is no run folder (it has neither recipe.yaml nor metrics.jsonl)", "give a run's `output`"
        )
    recipe = root / "recipe.yaml"
    again = f"delete {root / 'dataset'} and run `minisft inspect {root}`, which prepares the data again"
    without = "delete it: the page does without it"
    preview = _read_json(root / "dataset" / "preview.json", without, rows=list)
    return RunFiles(
        root,
        read_metrics(RunFolder(root)),
        read_results(root),
        _read_json(root / "dataset" / "ledger.json", again, rows=dict),
        recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        preview["rows"] if preview else [],
        _read_json(root / "environment.json", without),
    )


def metrics_of(run: RunFiles) -> list[str]:
    """The metrics that the run was scored by."""
    return [metric for metric in METRIC_NAMES if run.results is not None and metric in run.results["base"]]


def read_answers(run: RunFiles, system: str, name: str) -> list[dict[str, Any]]:
    """Read `evaluation/SYSTEM/NAME`, a line for each answer; a missing file is empty.

    Raises:
        UserError: the file is damaged.
    """
    fix = f"run `minisft evaluate {run.root}`, which writes it again: no answer is computed twice"
    return read_json_lines(run.root / "evaluation" / system / name, fix, id=str, prompt=str, output=str)


def _read_json(path: Path, fix: str, **fields: type) -> dict[str, Any] | None:
    return read_json(path, fix, **fields) if path.is_file() else None


CURVE_POINTS = 1500
EXAMPLE_BYTES = 1_500_000  # of example text on the page; all of it lies in outputs.jsonl
CHANGED = 5  # most improved rows on the page, and as many most worsened


def page_data(run: RunFiles) -> dict[str, Any]:
    """The content of the page's data element."""
    losses = [(line["step"], line["loss"]) for line in run.steps if line.get("loss") is not None]
    stride = max(1, len(losses) // CURVE_POINTS)
    return {
        "train": [[step, rounded(loss)] for step, loss in losses[::stride]],
        "test": [[step, rounded(loss)] for step, loss in run.held_out],
        "scores": _score_points(run),
        "systems": [name for name, _ in run.systems],
        "best": run.results["best"] if run.results else None,
        "bestLabel": best_label(run.results) if run.results else None,
        "scoreName": "chrF" if "chrf" in metrics_of(run) else "BLEU",
        "examples": [*_prompt_rows(run), *_example_rows(run)],
    }


def _score_points(run: RunFiles) -> dict[str, Any] | None:
    """(step, score, low, high) of every model; without low and high where they would claim too much."""
    if run.results is None:
        return None
    keys = ("score", "low", "high") if is_reliable(run.results) else ("score",)
    points = {}
    for metric in metrics_of(run):
        scores = [(entry["step"], entry[metric]) for _, entry in run.systems]
        points[metric] = {
            "points": [[step, *(rounded(s[key]) for key in keys)] for step, s in scores],
            "constant": rounded(run.results["constant"][metric]["score"]),
        }
    return points


def _example_rows(run: RunFiles) -> list[dict[str, Any]]:
    """Rows with the answer of every system: the first, the most changed, then as many as there is room for."""
    lines = [read_answers(run, name, "outputs.jsonl") for name, _ in run.systems]
    if not lines or not all(len(rows) == len(lines[0]) for rows in lines):
        return []
    metric = "chrf" if "chrf" in metrics_of(run) else "bleu"
    examples, spent = [], 0
    for place, title in _order(run, lines, metric):
        rows = [system[place] for system in lines]
        example = _side_by_side(rows, f"{rows[0]['id']}, answer {rows[0]['turn']}{title}", metric)
        spent += len(json.dumps(example, ensure_ascii=False).encode())
        if spent > EXAMPLE_BYTES:
            break
        examples.append(example)
    return examples


def _prompt_rows(run: RunFiles) -> list[dict[str, Any]]:
    """The user's own prompts, where every system has answered the same ones."""
    lines = [read_answers(run, name, "prompts.jsonl") for name, _ in run.systems]
    if not lines or not all([row["id"] for row in rows] == [row["id"] for row in lines[0]] for rows in lines):
        return []
    return [_side_by_side(list(rows), f"your {rows[0]['id']}", None) for rows in zip(*lines, strict=True)]


def _side_by_side(rows: list[dict[str, Any]], title: str, metric: str | None) -> dict[str, Any]:
    """One question with the answer of every system."""
    texts = list(dict.fromkeys(row["output"] for row in rows))  # many checkpoints give the same answer
    place = {text: number for number, text in enumerate(texts)}
    return {
        "title": title,
        "prompt": rows[0]["prompt"],
        "reference": rows[0].get("reference"),
        "texts": texts,
        "outputs": [place[row["output"]] for row in rows],
        "scores": [round(row[metric], 1) if metric in row else None for row in rows],
    }


def _order(run: RunFiles, lines: list[list[dict[str, Any]]], metric: str) -> Iterable[tuple[int, str]]:
    """(row, what is special about it): first rows, most improved, most worsened, all others."""
    names = [name for name, _ in run.systems]
    best = run.results["best"] if run.results else None
    titles = dict.fromkeys(range(min(3, len(lines[0]))), "")
    if best in names and lines[0] and metric in lines[0][0]:
        after = lines[names.index(best)]
        gains = [late[metric] - early[metric] for early, late in zip(lines[0], after, strict=True)]
        order = sorted(range(len(gains)), key=lambda row: -gains[row])
        for rows, word in ((order[:CHANGED], "improved"), (order[::-1][:CHANGED], "worsened")):
            for row in rows:
                if (gains[row] > 0) == (word == "improved") and gains[row]:
                    titles[row] = f" ({word}: {gains[row]:+.1f} {METRIC_NAMES[metric]})"
    yield from titles.items()
    yield from ((row, "") for row in range(len(lines[0])) if row not in titles)
