"""Several runs side by side: what each measured, as JSON, Markdown and a page."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from minisft.files import write_atomically
from minisft.report.html import environment, table, whole_page
from minisft.report.plots import draw_overlaid
from minisft.report.run_data import RunFiles, read_run, rounded
from minisft.report.tables import comparison_table, markdown_table
from minisft.report.verdict import comparison_verdict, is_trained
from minisft.results import MIN_CONVERSATIONS, is_below_base, is_reliable
from minisft.text import dump_json, printable

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
    write_atomically(output / "comparison.json", dump_json(found, indent=1) + "\n")
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
    return f"# Comparison: {name}\n\n{sentences}\n\n{markdown_table(heads, rows)}\n![curves](comparison.png)\n"


CURVE_POINTS = 1500  # of a curve
COLORS = 8
_CURVES = {"loss": "Loss per supervised token", "grad_norm": "Gradient norm before clipping"}
_BARS = (
    ("seconds_per_step", "Seconds a step, median", "{:.2f}", 1.0),
    ("peak_memory_mb", "GB a process, peak", "{:.2f}", 1e-3),
    ("communication_mb", "MB sent a process and step", "{:,.1f}", 1.0),
)
_NOTES = """<p class="soft">s/step is the median of all steps but the first, tokens/s the supervised tokens of those
steps by their time. GB is the peak of the largest process. MB sent is what a process sends in a step, counted at every
collective as the least that it needs. Test loss, BLEU and chrF are those of the best checkpoint{intervals}; below base:
the base model scores higher. differs is the largest difference of loss or gradient norm in any step, as a share of the
first variant's of the same trajectory.</p>
"""


def comparison_page(output: Path, found: dict[str, Any], steps: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page as HTML.

    Args:
        output: the folder of the comparison.
        found: the content of comparison.json.
        steps: the lines of metrics.jsonl by variant.
    """
    sections = [_verdict(found), _curves(found, steps), _spent(found), _figures(found), _variants(output, found)]
    body = "".join(sections) + f'<p class="soft">Written with {escape(found["environment"])}.</p>\n'
    return whole_page(output.resolve().name, "MiniSFT comparison", body, _page_data(found, steps), "comparison.js")


def _page_data(found: dict[str, Any], steps: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "names": list(steps),
        "curves": {key: [_points(lines, key) for lines in steps.values()] for key in _CURVES},
        "tolerance": found["tolerance"],
    }


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[list[float]]:
    points = [[line["step"], rounded(line[key])] for line in lines if _is_drawn(line.get(key))]
    return points[:: max(1, len(points) // CURVE_POINTS)]


def _is_drawn(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")


# --- the sections -----------------------------------------------------------------------------------------


def _verdict(found: dict[str, Any]) -> str:
    failed = {variant["name"] for variant in found["variants"] if variant["status"] == "failed"}
    said = [text for text in found["verdict"] if not any(text.startswith(f"{name} failed (") for name in failed)]
    lines = "".join(f"<p>{escape(text)}</p>" for text in said or ["No variant has been run to its end."])
    return f'<div class="verdict">{lines}</div>\n{_failures(found)}'


def _failures(found: dict[str, Any]) -> str:
    return "".join(
        f'<p class="bad">{escape(v["name"])} failed ({escape(v["failed_at"])}), the others went on:</p>'
        f'<pre tabindex="0">{escape(v["error"] or "")}</pre>\n'
        for v in found["variants"]
        if v["status"] == "failed"
    )


def _curves(found: dict[str, Any], steps: dict[str, list[dict[str, Any]]]) -> str:
    if not steps:
        return ""
    names = ", ".join(f'<span class="key{place % COLORS}">{escape(name)}</span>' for place, name in enumerate(steps))
    figures = "".join(
        f'<figure id="{key}"><figcaption>{title}: {names}.</figcaption></figure>\n' for key, title in _CURVES.items()
    )
    return f"""<h2 id="curves">Curves</h2>
<div class="controls"><label><input type="checkbox" id="log"> logarithmic</label>
<label>smoothing <input type="range" id="smooth" min="0" max="98" value="0"></label></div>
<div class="pair">{figures}</div>
"""


def _spent(found: dict[str, Any]) -> str:
    charts = []
    for key, title, form, scale in _BARS:
        bars = [(v["name"], v[key] * scale) for v in found["variants"] if v.get(key) is not None and is_trained(v)]
        if bars and max(value for _, value in bars) > 0:
            charts.append(f"<div><h3>{title}</h3>{_bars(bars, title, form)}</div>")
    if not charts:
        return ""
    return f'<h2 id="spent">Time, memory, communication</h2>\n<div class="pair">{"".join(charts)}</div>\n'


def _bars(bars: Sequence[tuple[str, float]], title: str, form: str) -> str:
    """A bar for each variant, its name above it."""
    most, height = max(value for _, value in bars), 46
    lines = [
        f'<text x="0" y="{place * height + 18}">{escape(name)}</text>'
        f'<rect class="bar" x="0" y="{place * height + 24}" width="{value / most * 330:.1f}" height="14"/>'
        f'<text x="{value / most * 330 + 6:.1f}" y="{place * height + 37}">{form.format(value)}</text>'
        for place, (name, value) in enumerate(bars)
    ]
    said = ", ".join(f"{name} {form.format(value)}" for name, value in bars)
    label = escape(f"{title}: {said}", quote=True)
    return f'<svg viewBox="0 0 420 {len(bars) * height}" role="img" aria-label="{label}">{"".join(lines)}</svg>'


def _figures(found: dict[str, Any]) -> str:
    heads, rows, takes = comparison_table(found)
    shown = table(heads, list(zip(rows, takes, strict=True)))
    return (
        f'<h2 id="figures">Figures</h2>\n<div class="scroll" tabindex="0" role="region" aria-labelledby="figures">'
        f"{shown}</div>\n{_NOTES.format(intervals=_intervals(found['variants']))}"
    )


def _intervals(variants: Sequence[dict[str, Any]]) -> str:
    """What the notes say of intervals: of how many variants they are told."""
    told = [is_reliable(v[metric]) for v in variants for metric in ("bleu", "chrf") if metric in v]
    if all(told):
        return ", with 95 % intervals"
    few = f"fewer than {MIN_CONVERSATIONS} held-out conversations support"
    return f", with 95 % intervals; {few} none" if any(told) else f"; {few} no interval"


def _variants(output: Path, found: dict[str, Any]) -> str:
    rows = [
        ([variant["name"], " ".join(variant["overrides"]), f"minisft report {output / variant['folder']}"], False)
        for variant in found["variants"]
    ]
    shown = table(["", "set apart by", "its own page"], rows)
    return (
        f'<h2 id="variants">Variants</h2>\n<div class="scroll" tabindex="0" role="region" aria-labelledby="variants">'
        f"{shown}</div>\n"
        '<p class="soft">Each is a whole run folder, which evaluate, chat, report and export take; its log lies beside '
        "it.</p>\n"
    )
