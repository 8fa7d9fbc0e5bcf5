"""Several runs side by side: what each measured, whether their curves are one, and which to take."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from minisft.claims import is_below_base
from minisft.files import write_atomically
from minisft.report.comparison_page import comparison_page
from minisft.report.comparison_verdict import comparison_verdict, is_trained
from minisft.report.curves import draw_overlaid
from minisft.report.html import environment
from minisft.report.run_files import RunFiles, read_run
from minisft.report.tables import comparison_table, markdown
from minisft.text import json_text, printable

TOLERANCE = 2e-4  # relative: what rounding in fp32 comes to, and a wrong loss or gradient does not
_COMPARED = ("loss", "grad_norm")
_STARTS = ("recipe", "start")  # a variant that failed there has no figures of its own


@dataclass(frozen=True)
class Entry:
    """One variant of a comparison.

    Args:
        name: of the variant.
        folder: its run folder, relative to the comparison's.
        overrides: the `key=value` words that set it apart.
        trajectory: variants with the same one should take the same steps.
        status: "waiting", "done" or "failed".
        failed_at: "recipe", "start", "train" or "evaluate".
        error: why.
    """

    name: str
    folder: str
    overrides: tuple[str, ...]
    trajectory: str
    status: str = "waiting"
    failed_at: str | None = None
    error: str | None = None


def write_comparison(output: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Measure the variants' run folders and write `comparison.json`, `.md`, `.png` and `.html` into `output`.

    Returns:
        The content of comparison.json.
    """
    runs = {entry.name: run for entry in entries if (run := _run_of(output, entry)) is not None}
    found = compare_runs(entries, runs)
    write_atomically(output / "comparison.json", json_text(found, indent=1) + "\n")
    write_atomically(output / "comparison.md", printable(_as_markdown(output.resolve().name, found)))
    steps = {name: run.steps for name, run in runs.items() if run.steps}
    if steps:
        draw_overlaid(output / "comparison.png", steps)
    write_atomically(output / "comparison.html", comparison_page(output, found, steps))
    return found


def compare_runs(entries: Sequence[Entry], runs: dict[str, RunFiles]) -> dict[str, Any]:
    """Return the content of comparison.json.

    Args:
        entries: all variants, in their order.
        runs: of those that have begun, by name.
    """
    variants = []
    firsts: dict[str, Entry] = {}  # of each trajectory, what the others are held against
    for entry in entries:
        figures = asdict(entry) | {"overrides": list(entry.overrides)}
        run = runs.get(entry.name)
        if run is not None:
            figures |= measure(run)
        if run is not None and run.steps and is_trained(asdict(entry)):
            first = firsts.setdefault(entry.trajectory, entry)
            if first is not entry:
                figures["against"] = {"variant": first.name, **differences(runs[first.name].steps, run.steps)}
        variants.append(figures)
    found: dict[str, Any] = {"tolerance": TOLERANCE, "variants": variants, "environment": environment()}
    return found | comparison_verdict(found)


def _run_of(output: Path, entry: Entry) -> RunFiles | None:
    root = output / entry.folder
    if entry.failed_at in _STARTS or entry.status == "waiting" or not (root / "recipe.yaml").is_file():
        return None
    return read_run(root)


def measure(run: RunFiles) -> dict[str, Any]:
    """Return the figures of one run: None where it does not say.

    Times are those of all steps but the first, which also sets up what the later ones use.
    """
    steps = [line for line in run.steps if line.get("seconds")]
    timed = steps[1:] or steps
    losses = [line["loss"] for line in steps if _is_number(line.get("loss"))]
    memory = [line["peak_memory_mb"] for line in steps if line.get("peak_memory_mb")]
    sent = [line["communication_mb"] for line in timed if line.get("communication_mb") is not None]
    seconds = sum(line["seconds"] for line in timed)
    return {
        "precision": (run.environment or {}).get("precision"),
        "steps": len(steps),
        "seconds_per_step": median(line["seconds"] for line in timed) if timed else None,
        "supervised_tokens_per_second": sum(line["supervised_tokens"] for line in timed) / seconds if timed else None,
        "training_seconds": sum(line["seconds"] for line in steps),
        "peak_memory_mb": max(memory, default=None),
        "communication_mb": median(sent) if sent else None,
        "final_loss": losses[-1] if losses else None,
        **_scores(run),
    }


def _scores(run: RunFiles) -> dict[str, Any]:
    """Return loss, BLEU and chrF of the best checkpoint on the held-out rows."""
    best = next((entry for name, entry in run.systems if run.results and name == run.results["best"]), None)
    if best is None or run.results is None:
        return {"best": None, "test_loss": None}
    scores: dict[str, Any] = {
        m: {key: best[m][key] for key in ("score", "low", "high", "reliable") if key in best[m]}
        for m in ("bleu", "chrf")
        if m in best
    }
    below = {"below_base": True} if is_below_base(run.results) else {}
    return {"best": best["checkpoint"], "test_loss": best.get("loss"), **scores, **below}


def differences(reference: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return by how much losses and gradient norms differ from a reference's, as a share of the latter.

    Returns:
        steps: how many both have; loss, grad_norm: the largest difference; apart: in how many steps either is above
        the tolerance; parts_at: the first of these, or None.
    """
    before = {line["step"]: line for line in reference}
    common = [(before[line["step"]], line) for line in steps if line["step"] in before]
    largest = dict.fromkeys(_COMPARED, 0.0)
    apart = []
    for expected, line in common:
        off = {key: relative_difference(expected.get(key), line.get(key)) for key in _COMPARED}
        largest = {key: max(largest[key], off[key]) for key in _COMPARED}
        if max(off.values()) > TOLERANCE:
            apart.append(line["step"])
    return {"steps": len(common), **largest, "apart": len(apart), "parts_at": apart[0] if apart else None}


def relative_difference(expected: float | None, found: float | None) -> float:
    """Return |found - expected| / |expected|; 0 where neither is a number, 1 where only one is."""
    if not (_is_number(expected) and _is_number(found)):
        return float(_is_number(expected) != _is_number(found))
    assert expected is not None
    assert found is not None
    return 0.0 if found == expected else abs(found - expected) / max(abs(expected), 1e-30)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _as_markdown(name: str, found: dict[str, Any]) -> str:
    heads, rows, _ = comparison_table(found)
    sentences = "\n".join(f"- {sentence}" for sentence in found["verdict"])
    return f"# Comparison: {name}\n\n{sentences}\n\n{markdown(heads, rows)}\n![curves](comparison.png)\n"
