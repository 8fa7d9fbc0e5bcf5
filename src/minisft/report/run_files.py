"""What a run folder says: read leniently, since a page about a half-finished run is better than none."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.claims import qualify
from minisft.errors import UserError

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
        UserError: the folder is no run.
    """
    if not (root / "recipe.yaml").is_file() and not (root / "metrics.jsonl").is_file():
        raise UserError(
            root, "this is no run folder (it has neither recipe.yaml nor metrics.jsonl)", "give a run's `output`"
        )
    recipe = root / "recipe.yaml"
    results = _read_json(root / "evaluation" / "results.json")
    return RunFiles(
        root,
        read_lines(root / "metrics.jsonl"),
        None if results is None else qualify(results),
        _read_json(root / "dataset" / "ledger.json"),
        recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        (_read_json(root / "dataset" / "preview.json") or {}).get("rows", []),
        _read_json(root / "environment.json"),
    )


def metrics_of(run: RunFiles) -> list[str]:
    """The metrics that the run was scored by."""
    return [metric for metric in METRIC_NAMES if run.results is not None and metric in run.results["base"]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a torn last one is left out, a missing file is empty."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
