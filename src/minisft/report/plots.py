"""The curves of a run as PNG files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.manifest import record_files
from minisft.report.run_data import RunFiles, metrics_of, read_run
from minisft.report.tables import directed_title
from minisft.results import best_label, is_reliable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7.0, 4.0)  # inches
_PANEL, _LEGEND_HEIGHT, _MOST_COLUMNS = (4.2, 2.9), 0.4, 3  # of a figure with several panels
# Distinguishable with colour blindness too: Okabe and Ito 2008, "Color Universal Design".
_VARIANT_COLORS = ("#56b4e9", "#e69f00", "#009e73", "#1a1a1a", "#cc79a7", "#0072b2", "#d55e00", "#b0a000")
_TRAIN, _TEST, _MARK = "#4c78a8", "#e45756", "#888888"


def draw_curves(output: Path, to: Path | None = None) -> list[Path]:
    """Draw `evaluation/loss.png` and, if there are scores, `evaluation/scores.png` of a run folder, or into `to`.

    Returns:
        The paths of the files; none if the run has neither steps nor results.

    Raises:
        UserError: The folder is not a run folder.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps global state

    run = read_run(output)
    folder = (to or output) / "evaluation"
    written = []

    # 1. The training loss at every step, the held-out loss at every checkpoint.
    if run.steps or run.systems:
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        steps = [line for line in run.steps if line.get("loss") is not None]
        if steps:
            xs, ys = [line["step"] for line in steps], [line["loss"] for line in steps]
            axes.plot(xs, ys, color=_TRAIN, linewidth=1.2, label="training, each step")
        if run.held_out:
            label = "held-out, each checkpoint" if run.systems else "held-out"
            axes.plot(*zip(*run.held_out, strict=True), "o-", color=_TEST, markersize=4, label=label)
        _mark_best(axes, run)
        _finish(axes, "loss per supervised token")
        written.append(_write(figure, folder / "loss.png"))

    # 2. The scores of every model.
    if metrics_of(run):
        written.append(_write(_score_panels(run), folder / "scores.png"))
    return written


def _score_panels(run: RunFiles) -> "Figure":
    """Return a panel for each metric: the scores of every model, and that of the constant baseline as a dotted line.

    Metrics have different scales, so they share no axis.
    """
    from matplotlib.figure import Figure

    assert run.results is not None
    metrics, reliable = metrics_of(run), is_reliable(run.results)
    columns = 2 if len(metrics) in (2, 4) else min(len(metrics), _MOST_COLUMNS)
    rows = -(-len(metrics) // columns)
    size = _SIZE if len(metrics) == 1 else (_PANEL[0] * columns, _PANEL[1] * rows + _LEGEND_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, metric in zip(panels, metrics, strict=False):
        entries = [entry for _, entry in run.systems if metric in entry]
        xs, scores = [entry["step"] for entry in entries], [entry[metric] for entry in entries]
        ys = [score["score"] for score in scores]
        bars = None  # lengths below and above the scores
        if reliable:
            below = [max(0.0, score["score"] - score["low"]) for score in scores]
            bars = (below, [max(0.0, score["high"] - score["score"]) for score in scores])
        axes.errorbar(xs, ys, bars, fmt="o-", color=_TRAIN, capsize=3, markersize=4, label="base and checkpoints")
        constant = run.results["constant"].get(metric)
        if constant is not None:
            axes.axhline(constant["score"], color=_TEST, linestyle=":", linewidth=1.4, label="constant baseline")
        _mark_best(axes, run)
        axes.set_title(directed_title(run.results, metric), fontsize="medium")
        _finish(axes, "score, 95 % interval" if reliable else "score", legend=False)
        if axes.get_ylim()[0] > 0 or min(ys, default=0) >= 0:  # a metric of one's own may be negative
            axes.set_ylim(bottom=0)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_overlaid(path: Path, runs: dict[str, list[dict[str, Any]]]) -> Path:
    """Draw loss and gradient norm of several runs over each other, so that coinciding curves all stay visible.

    Args:
        path: Path of the PNG file.
        runs: The lines of metrics.jsonl by the name of the run.

    Returns:
        The path of the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    quantities = (("loss", "loss per supervised token"), ("grad_norm", "gradient norm"))
    for axes, (key, label) in zip(figure.subplots(1, 2), quantities, strict=True):
        for index, (name, steps) in enumerate(runs.items()):
            points = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
            width = 1.2 + 2.2 * (len(runs) - 1 - index)  # the first curve is the widest, and lies below the others
            color = _VARIANT_COLORS[index % len(_VARIANT_COLORS)]
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, label=name)
        _finish(axes, label)
    return _write(figure, path)


def _mark_best(axes: "Axes", run: RunFiles) -> None:
    """Draw a vertical line at the step of the best checkpoint."""
    if run.best is not None and run.results is not None:
        label = best_label(run.results).replace("best", "best checkpoint")
        axes.axvline(run.best["step"], color=_MARK, linestyle="--", linewidth=1, label=label)


def _finish(axes: "Axes", label: str, legend: bool = True) -> None:
    """Add the labels of the axes, the grid and the legend."""
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _write(figure: "Figure", path: Path) -> Path:
    """Write a PNG file through a temporary one, so that it is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    record_files(temporary, path)
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)
    return path
