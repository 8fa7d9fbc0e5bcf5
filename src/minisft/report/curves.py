"""The curves of a run as PNG files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.report.run_files import RunFiles, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (7.0, 4.0)  # inches
_NAMES = {"bleu": "BLEU", "chrf": "chrF"}
_TRAIN, _TEST, _MARK = "#4c78a8", "#e45756", "#888888"


def draw_curves(output: Path) -> list[Path]:
    """Draw `evaluation/loss.png` and, where there are scores, `evaluation/scores.png` of a run folder.

    Returns:
        The files written; none where the run has neither steps nor results.

    Raises:
        UserError: the folder is no run.
    """
    run = read_run(output)
    drawn = []
    if run.steps or run.systems:
        drawn.append(_save(output / "evaluation" / "loss.png", "loss per supervised token", _draw_loss, run))
    if run.systems:
        drawn.append(_save(output / "evaluation" / "scores.png", "score, 95 % interval", _draw_scores, run))
    return drawn


def _save(path: Path, label: str, draw: Any, run: RunFiles) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    draw(axes, run)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=150, format="png")
    aside.replace(path)
    return path


def _draw_loss(axes: "Axes", run: RunFiles) -> None:
    steps = [line for line in run.steps if line.get("loss") is not None]
    if steps:
        xs, ys = [line["step"] for line in steps], [line["loss"] for line in steps]
        axes.plot(xs, ys, color=_TRAIN, linewidth=1.2, label="training, each step")
    points = [(entry["step"], entry["loss"]) for _, entry in run.systems if entry.get("loss") is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color=_TEST, markersize=4, label="held-out, each checkpoint")
    _mark_best(axes, run)


def _draw_scores(axes: "Axes", run: RunFiles) -> None:
    assert run.results is not None
    for (metric, name), color in zip(_NAMES.items(), (_TRAIN, _TEST), strict=True):
        entries = [entry for _, entry in run.systems if metric in entry]
        if not entries:
            continue
        scores = [entry[metric] for entry in entries]
        below = [max(0.0, score["score"] - score["low"]) for score in scores]
        above = [max(0.0, score["high"] - score["score"]) for score in scores]
        xs, ys = [entry["step"] for entry in entries], [score["score"] for score in scores]
        axes.errorbar(xs, ys, (below, above), fmt="o-", color=color, capsize=3, markersize=4, label=name)
        constant = run.results["constant"][metric]["score"]
        axes.axhline(constant, color=color, linestyle=":", linewidth=1, label=f"{name} of the constant answer")
    axes.set_ylim(bottom=0)
    _mark_best(axes, run)


def _mark_best(axes: "Axes", run: RunFiles) -> None:
    best = next((e["step"] for name, e in run.systems if run.results and name == run.results["best"]), None)
    if best is not None:
        axes.axvline(best, color=_MARK, linestyle="--", linewidth=1, label="best checkpoint")
