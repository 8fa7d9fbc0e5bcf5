"""Several runs side by side: what each measured, as JSON, Markdown, PNG curves and a page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from minisft.files import write_atomically
from minisft.metric_names import METRICS
from minisft.report.html import CURVE_CONTROLS, environment, scrolling_table, whole_page
from minisft.report.plots import draw_overlaid
from minisft.report.run_data import CURVE_POINTS, RunFiles, read_run, rounded
from minisft.report.tables import comparison_table, markdown_table
from minisft.report.verdict import comparison_verdict, is_trained
from minisft.results import MIN_CONVERSATIONS, chosen_by, is_below_base, is_reliable, score_keys
from minisft.text import dump_json, printable

# Relative. Rounding in fp32 alone moves a loss or gradient norm by less, and a wrong strategy moves it by more.
TOLERANCE = 2e-4
COLORS = 8  # number of colours in page.css; the ninth curve has that of the first
_CURVES = {"loss": "Loss per supervised token", "grad_norm": "Gradient norm before clipping"}
_BEFORE_TRAINING = ("recipe", "start")  # a variant that failed at one of these has no figures of its own
_COSTS = (  # key, title, format, factor
    ("seconds_per_step", "Seconds per step, median", "{:.2f}", 1.0),
    ("peak_memory_mb", "Peak GB per process", "{:.2f}", 1e-3),
    ("communication_mb", "MB sent per process and step", "{:,.1f}", 1.0),
)
_NOTES = """<p class="soft">s/step is the median of all steps but the first, tokens/s the supervised tokens of those
steps divided by their time. GB is the peak of the largest process. MB sent is what a process sends in a step, counted
at every collective as the least that the collective needs. Test loss and the scores of the metrics are those of the
best checkpoint{intervals}; below base: the base model scores better. differs is the largest difference of loss or
gradient norm in any step, relative to the first variant of the same trajectory.</p>
"""


@dataclass(frozen=True)
class Entry:
    """One variant of a comparison.

    Args:
        name: Name of the variant.
        folder: Its run folder, relative to the folder of the comparison.
        overrides: The `key=value` words in which it differs from the recipe.
        trajectory: Variants with the same trajectory should take the same steps.
        status: "waiting", "done" or "failed".
        failed_at: "recipe", "start", "train" or "evaluate", if it failed.
        error: The message of the error, if it failed.
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
    # 1. Read the runs that have begun. The folder of a variant that failed before training may hold another run.
    runs = {
        entry.name: read_run(output / entry.folder)
        for entry in entries
        if entry.status != "waiting"
        and entry.failed_at not in _BEFORE_TRAINING
        and (output / entry.folder / "recipe.yaml").is_file()
    }
    steps = {name: run.steps for name, run in runs.items() if run.steps}

    # 2. Measure and compare them.
    comparison = compare_runs(entries, runs)
    write_atomically(output / "comparison.json", dump_json(comparison, indent=1) + "\n")

    # 3. Write the Markdown, the curves and the page.
    heads, rows, _ = comparison_table(comparison)
    sentences = "\n".join(f"- {sentence}" for sentence in comparison["verdict"])
    title = f"# Comparison: {output.resolve().name}"
    text = f"{title}\n\n{sentences}\n\n{markdown_table(heads, rows)}\n![curves](comparison.png)\n"
    write_atomically(output / "comparison.md", printable(text))
    if steps:
        draw_overlaid(output / "comparison.png", steps)
    write_atomically(output / "comparison.html", comparison_page(output, comparison, steps))
    return comparison


def compare_runs(entries: Sequence[Entry], runs: dict[str, RunFiles]) -> dict[str, Any]:
    """Return the content of comparison.json.

    Args:
        entries: All variants, in their order.
        runs: The run of each variant that has begun, by the variant's name.
    """
    variants = []
    references: dict[str, Entry] = {}  # the first variant of each trajectory, which the others are compared with
    for entry in entries:
        figures = asdict(entry) | {"overrides": list(entry.overrides)}
        run = runs.get(entry.name)
        if run is not None:
            figures |= measure(run)
        if run is not None and run.steps and is_trained(figures):
            reference = references.setdefault(entry.trajectory, entry)
            if reference is not entry:
                figures["against"] = {"variant": reference.name, **differences(runs[reference.name].steps, run.steps)}
        variants.append(figures)
    comparison: dict[str, Any] = {"tolerance": TOLERANCE, "variants": variants, "environment": environment()}
    return comparison | comparison_verdict(comparison)


def measure(run: RunFiles) -> dict[str, Any]:
    """Return the figures of one run; a figure that the run does not record is None.

    Times are those of all steps but the first, which also sets up what the later ones use. Scores and test loss are
    those of the best checkpoint on the held-out rows.
    """
    steps = [line for line in run.steps if line.get("seconds")]
    timed = steps[1:] or steps
    losses = [line["loss"] for line in steps if _is_finite(line.get("loss"))]
    memory = [line["peak_memory_mb"] for line in steps if line.get("peak_memory_mb")]
    sent = [line["communication_mb"] for line in timed if line.get("communication_mb") is not None]
    seconds = sum(line["seconds"] for line in timed)
    figures = {
        "precision": (run.environment or {}).get("precision"),
        "steps": len(steps),
        "seconds_per_step": median(line["seconds"] for line in timed) if timed else None,
        "supervised_tokens_per_second": sum(line["supervised_tokens"] for line in timed) / seconds if timed else None,
        "training_seconds": sum(line["seconds"] for line in steps),
        "peak_memory_mb": max(memory, default=None),
        "communication_mb": median(sent) if sent else None,
        "final_loss": losses[-1] if losses else None,
        "best": None,
        "test_loss": None,
    }
    if run.results is not None and run.best is not None:
        figures |= {"best": run.best["checkpoint"], "test_loss": run.best.get("loss")}
        kept = ("score", "low", "high", "reliable")
        scores = {
            key: {name: run.best[key][name] for name in kept if name in run.best[key]} for key in score_keys(run.best)
        }
        metric, higher = chosen_by(run.results)
        figures |= {"scores": scores, "best_by": {"metric": metric, "higher_is_better": higher}}
        figures |= {key: scores[key] for key in METRICS if key in scores}  # where earlier versions had them
        if is_below_base(run.results):
            figures["below_base"] = True
    return figures


def differences(reference: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the relative differences of losses and gradient norms from those of a reference run.

    Args:
        reference: The lines of the reference's metrics.jsonl.
        steps: The lines of the other run's metrics.jsonl.

    Returns:
        `steps`: number of steps that both have; `loss`, `grad_norm`: the largest relative differences; `apart`:
        number of steps in which either is above the tolerance; `parts_at`: the first of these steps, or None.
    """
    expected = {line["step"]: line for line in reference}
    common = [(expected[line["step"]], line) for line in steps if line["step"] in expected]
    largest = dict.fromkeys(_CURVES, 0.0)
    apart = []
    for expected_line, line in common:
        off = {key: relative_difference(expected_line.get(key), line.get(key)) for key in _CURVES}
        largest = {key: max(largest[key], off[key]) for key in _CURVES}
        if max(off.values()) > TOLERANCE:
            apart.append(line["step"])
    return {"steps": len(common), **largest, "apart": len(apart), "parts_at": apart[0] if apart else None}


def relative_difference(expected: float | None, actual: float | None) -> float:
    """Return |actual - expected| / |expected|; 0 if neither is a finite number, 1 if only one is."""
    if not (_is_finite(expected) and _is_finite(actual)):
        return float(_is_finite(expected) != _is_finite(actual))
    assert expected is not None
    assert actual is not None
    return 0.0 if actual == expected else abs(actual - expected) / max(abs(expected), 1e-30)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def comparison_page(output: Path, comparison: dict[str, Any], steps: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page as HTML.

    Args:
        output: The folder of the comparison.
        comparison: The content of comparison.json.
        steps: The lines of metrics.jsonl by variant.
    """
    variants = comparison["variants"]
    parts = [_verdict(comparison)]

    # 1. The curves: the first ones are the widest, so that coinciding curves stay visible.
    widest = min(len(steps), 4) - 1
    styles = [f"c{index % COLORS} wide{max(0, widest - index)}" for index in range(len(steps))]
    names = ", ".join(f'<span class="key{i % COLORS}">{escape(name)}</span>' for i, name in enumerate(steps))
    section, curves = curves_section(steps, styles, names)
    parts.append(section)

    # 2. What each variant cost.
    parts.append(_cost_charts(variants))

    # 3. All figures, with notes that say which of the scores have intervals.
    reliable = [is_reliable(score) for v in variants for score in v.get("scores", {}).values()]
    few = f"fewer than {MIN_CONVERSATIONS} held-out conversations support"
    if all(reliable):
        intervals = ", with 95 % intervals"
    else:
        intervals = f", with 95 % intervals; {few} no interval" if any(reliable) else f"; {few} no interval"
    heads, rows, takes = comparison_table(comparison)
    table = scrolling_table("figures", heads, list(zip(rows, takes, strict=True)))
    parts.append(f'<h2 id="figures">Figures</h2>\n{table}{_NOTES.format(intervals=intervals)}')

    # 4. The variants, and how to see the page of each.
    commands = [
        ([v["name"], " ".join(v["overrides"]), f"minisft report {output / v['folder']}"], False) for v in variants
    ]
    table = scrolling_table("variants", ["", "overrides", "command for its page"], commands)
    parts.append(
        f'<h2 id="variants">Variants</h2>\n{table}'
        '<p class="soft">Each is a complete run folder, which evaluate, chat, report and export accept; its log is '
        "beside it.</p>\n"
    )
    parts.append(f'<p class="soft">Written with {escape(comparison["environment"])}.</p>\n')
    data = {**curves, "tolerance": comparison["tolerance"]}
    return whole_page(output.resolve().name, "MiniSFT comparison", "".join(parts), data, "comparison.js")


def curves_section(
    steps: Mapping[str, Sequence[dict[str, Any]]], styles: Sequence[str], legend: str
) -> tuple[str, dict[str, Any]]:
    """Return the curves of several runs as a section of a page, "" without runs, and the data of comparison.js.

    Args:
        steps: The lines of metrics.jsonl by the run's name. Finite values are drawn, about CURVE_POINTS of each curve.
        styles: The classes of page.css of each run's curves; later curves cover earlier ones.
        legend: HTML that names the runs, in which untrusted text is escaped.
    """
    curves: dict[str, list[list[list[float]]]] = {key: [] for key in _CURVES}
    for key, lines in product(_CURVES, steps.values()):
        points = [[line["step"], rounded(line[key])] for line in lines if _is_finite(line.get(key))]
        curves[key].append(points[:: max(1, len(points) // CURVE_POINTS)])
    figures = "".join(
        f'<figure id="{key}"><figcaption>{title}: {legend}.</figcaption></figure>\n' for key, title in _CURVES.items()
    )
    section = f'<h2 id="curves">Curves</h2>\n{CURVE_CONTROLS}\n<div class="pair">{figures}</div>\n' if steps else ""
    return section, {"names": list(steps), "styles": list(styles), "curves": curves}


def _verdict(comparison: dict[str, Any]) -> str:
    """Return the sentences of the verdict, and the error of each failed variant in full."""
    failed = [v for v in comparison["variants"] if v["status"] == "failed"]
    beginnings = tuple(f"{v['name']} failed (" for v in failed)  # these sentences would repeat the errors below
    sentences = [sentence for sentence in comparison["verdict"] if not sentence.startswith(beginnings)]
    lines = "".join(f"<p>{escape(line)}</p>" for line in sentences or ["No variant has finished."])
    errors = "".join(
        f'<p class="bad">{escape(v["name"])} failed ({escape(v["failed_at"])}), the others continued:</p>'
        f'<pre tabindex="0">{escape(v["error"] or "")}</pre>\n'
        for v in failed
    )
    return f'<div class="verdict">{lines}</div>\n{errors}'


def _cost_charts(variants: Sequence[dict[str, Any]]) -> str:
    """Return a chart for each cost that was measured: a bar for each trained variant, with its name above it."""
    charts = []
    height, full_width = 46, 330
    for key, title, form, factor in _COSTS:
        values = [(v["name"], v[key] * factor) for v in variants if v.get(key) is not None and is_trained(v)]
        largest = max((value for _, value in values), default=0)
        if largest <= 0:
            continue
        bars = []
        for index, (name, value) in enumerate(values):
            y, width = index * height, value / largest * full_width
            bars.append(
                f'<text x="0" y="{y + 18}">{escape(name)}</text>'
                f'<rect class="bar" x="0" y="{y + 24}" width="{width:.1f}" height="14"/>'
                f'<text x="{width + 6:.1f}" y="{y + 37}">{form.format(value)}</text>'
            )
        label = escape(f"{title}: {', '.join(f'{name} {form.format(value)}' for name, value in values)}", quote=True)
        charts.append(
            f'<div><h3>{title}</h3><svg viewBox="0 0 420 {len(bars) * height}" role="img" aria-label="{label}">'
            f"{''.join(bars)}</svg></div>"
        )
    if not charts:
        return ""
    return f'<h2 id="spent">Time, memory, communication</h2>\n<div class="pair">{"".join(charts)}</div>\n'
