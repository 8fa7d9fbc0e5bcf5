"""The curves of a run as PNG files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.manifest import record_files
from minisft.report.run_data import RunFiles, metrics_of, read_run
from minisft.results import best_label, is_reliable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_SIZE = (7.0, 4.0)  # inches
_NAMES = {"bleu": "BLEU", "chrf": "chrF"}
# Told apart with colour blindness too: Okabe and Ito 2008, "Color Universal Design".
_OVERLAID = ("#56b4e9", "#e69f00", "#009e73", "#1a1a1a", "#cc79a7", "#0072b2", "#d55e00", "#b0a000")
_TRAIN, _TEST, _MARK = "#4c78a8", "#e45756", "#888888"


def draw_curves(output: Path, to: Path | None = None) -> list[Path]:
    """Draw `evaluation/loss.png` and, where there are scores, `evaluation/scores.png` of a run folder, or into `to`.

    Returns:
        The files written; none where the run has neither steps nor results.

    Raises:
        UserError: the folder is no run.
    """
    run = read_run(output)
    folder = (to or output) / "evaluation"
    drawn = []
    if run.steps or run.systems:
        drawn.append(_save(folder / "loss.png", "loss per supervised token", _draw_loss, run))
    if metrics_of(run):
        label = "score, 95 % interval" if run.results and is_reliable(run.results) else "score"
        drawn.append(_save(folder / "scores.png", label, _draw_scores, run))
    return drawn


def draw_overlaid(path: Path, variants: dict[str, list[dict[str, Any]]]) -> Path:
    """Draw loss and gradient norm of several runs over each other; curves that coincide all stay to be seen.

    Args:
        path: of the PNG.
        variants: the lines of metrics.jsonl by the name of the run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 2), (("loss", "loss per supervised token"), ("grad_norm", "gradient norm")), strict=True
    ):
        for place, (name, steps) in enumerate(variants.items()):
            points = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
            width = 1.2 + 2.2 * (len(variants) - 1 - place)  # the first is the widest, and lies below
            color = _OVERLAID[place % len(_OVERLAID)]
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, label=name)
        _finish(axes, label)
    return _write(figure, path)


def _save(path: Path, label: str, draw: Any, run: RunFiles) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    draw(axes, run)
    _finish(axes, label)
    return _write(figure, path)


def _finish(axes: "Axes", label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _write(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    record_files(temporary, path)
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
    return path


def _draw_loss(axes: "Axes", run: RunFiles) -> None:
    steps = [line for line in run.steps if line.get("loss") is not None]
    if steps:
        xs, ys = [line["step"] for line in steps], [line["loss"] for line in steps]
        axes.plot(xs, ys, color=_TRAIN, linewidth=1.2, label="training, each step")
    if run.held_out:
        label = "held-out, each checkpoint" if run.systems else "held-out"
        axes.plot(*zip(*run.held_out, strict=True), "o-", color=_TEST, markersize=4, label=label)
    _mark_best(axes, run)


def _draw_scores(axes: "Axes", run: RunFiles) -> None:
    assert run.results is not None
    for (metric, name), color in zip(_NAMES.items(), (_TRAIN, _TEST), strict=True):
        entries = [entry for _, entry in run.systems if metric in entry]
        if not entries:
            continue
        scores = [entry[metric] for entry in entries]
        xs, ys = [entry["step"] for entry in entries], [score["score"] for score in scores]
        bars = _error_bars(scores) if is_reliable(run.results) else None
        axes.errorbar(xs, ys, bars, fmt="o-", color=color, capsize=3, markersize=4, label=name)
        constant = run.results["constant"][metric]["score"]
        axes.axhline(constant, color=color, linestyle=":", linewidth=1, label=f"{name} of the constant answer")
    axes.set_ylim(bottom=0)
    _mark_best(axes, run)


def _error_bars(scores: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """How far the intervals reach below and above the scores."""
    below = [max(0.0, score["score"] - score["low"]) for score in scores]
    return below, [max(0.0, score["high"] - score["score"]) for score in scores]


def _mark_best(axes: "Axes", run: RunFiles) -> None:
    best = next((e["step"] for name, e in run.systems if run.results and name == run.results["best"]), None)
    if best is not None and run.results is not None:
        label = best_label(run.results).replace("best", "best checkpoint")
        axes.axvline(best, color=_MARK, linestyle="--", linewidth=1, label=label)
