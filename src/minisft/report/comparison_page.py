"""The page of a comparison: verdict, curves over each other, what each variant took, its scores, its failures."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from minisft.claims import MIN_CONVERSATIONS, is_reliable
from minisft.report.comparison_verdict import is_trained
from minisft.report.html import rounded, table, whole_page
from minisft.report.tables import comparison_table

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
