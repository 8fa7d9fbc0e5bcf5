"""What a run folder says: read leniently, since a page about a half-finished run is better than none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.claims import read_results
from minisft.errors import UserError
from minisft.json_files import read_json, read_json_lines

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
    again = f"run `minisft inspect {root}`, which prepares the data again"
    without = "delete it: the page does without it"
    preview = _read_json(root / "dataset" / "preview.json", without, rows=list)
    return RunFiles(
        root,
        read_json_lines(root / "metrics.jsonl", "delete the damaged lines: the page does without them", step=int),
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
