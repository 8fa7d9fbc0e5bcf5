"""One self-contained page of a run: opens offline, asks nobody for anything, and shows foreign text as text."""

from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from minisft.errors import UserError
from minisft.files import write_atomically
from minisft.report.html import environment, table, whole_page
from minisft.report.run_data import METRIC_NAMES, RunFiles, metrics_of, page_data, read_run
from minisft.report.tables import score_table
from minisft.report.verdict import verdict
from minisft.results import is_reliable, unreliability_reason

_KIND = "MiniSFT report"
_WRITTEN = ("report.html", "results.md", "evaluation")  # what a report consists of


def require_target(folder: Path) -> None:
    """Refuse to write a report into a folder that holds anything but an earlier report.

    Raises:
        UserError: naming what it holds.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(folder, "this is a file, and a report is written into a folder", "name a folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in _WRITTEN)
    if others or (any(folder.iterdir()) and not _is_report(folder / _WRITTEN[0])):
        holds = f" (it holds {others[0]!r})" if others else ""
        raise UserError(folder, f"this folder holds something else than a report{holds}", "name a new or empty folder")


def _is_report(path: Path) -> bool:
    return path.is_file() and f"{_KIND}</title>".encode() in path.read_bytes()[:4096]


def write_report(output: Path, to: Path | None = None) -> Path:
    """Write `report.html` from what the run folder `output` holds, into it or into the folder `to`.

    Returns:
        The page's path.

    Raises:
        UserError: the folder is no run.
    """
    run = read_run(output)
    page = whole_page(output.resolve().name, _KIND, sections(run), page_data(run), "page.js")
    path = (to or output) / "report.html"
    write_atomically(path, page)
    return path


def sections(run: RunFiles) -> str:
    """All of them, as far as the run folder holds what they show."""
    made = (_verdict, _curves, _scores, _examples, _ledger, _preview, _speed, _origin)
    return "".join(make(run) for make in made)


def _verdict(run: RunFiles) -> str:
    best = run.results["best"] if run.results else None
    folder = run.root / "checkpoints" / best if best else run.root
    return (
        f'<p class="verdict">{escape(verdict(run))}</p>\n<p>Talk to it: '
        f"<code>minisft chat {escape(str(folder))}</code></p>\n"
    )


def _curves(run: RunFiles) -> str:
    if not run.steps and not run.systems:
        return ""
    return """<h2 id="curves">Loss</h2>
<div class="controls"><label><input type="checkbox" id="log"> logarithmic</label>
<label>smoothing <input type="range" id="smooth" min="0" max="98" value="0"></label></div>
<figure id="loss"><figcaption>Mean over supervised tokens: <span class="key0">each training step</span>, and
<span class="key1">the held-out rows at each checkpoint</span>.</figcaption></figure>
"""


def _scores(run: RunFiles) -> str:
    """Without held-out answers nothing is scored, which the verdict says."""
    if run.results is None:
        return ""
    failed = [
        f'<p class="bad">{escape(f["checkpoint"])} could not be scored: {escape(f["error"])}</p>'
        for f in run.results.get("failed", [])
    ]
    metrics = metrics_of(run)
    if not metrics:
        return "".join(failed)
    intervals = ", 95 % intervals" if is_reliable(run.results) else ""
    figures = [
        f'<figure id="{metric}"><figcaption>{METRIC_NAMES[metric]}{intervals}; dotted: the constant answer.'
        "</figcaption></figure>"
        for metric in metrics
    ]
    heads, rows = score_table(run)
    return (
        f'<h2 id="scores">Scores on {run.results.get("answers", "the")} held-out answers</h2>\n'
        f'<div class="pair">{"".join(figures)}</div>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="scores">{table(heads, rows)}</div>\n'
        f"{''.join(failed)}{_score_notes(run.results, metrics)}"
    )


def _score_notes(results: dict[str, Any], metrics: list[str]) -> str:
    """What the rows and columns mean, or why they tell no more."""
    constant = escape(repr(results["constant"].get("text", "")))
    told = f"constant is the train answer that scores best when it is always given: {constant}. "
    if is_reliable(results):
        told += (
            f"p: how easily chance alone would give the difference of {METRIC_NAMES[metrics[0]]} from base, constant "
            "and best, by the paired bootstrap."
        )
    else:
        told += f"{unreliability_reason(results)}."
    return f'<p class="soft">{told}</p>\n'


def _examples(run: RunFiles) -> str:
    if run.results is None:
        return ""
    return """<h2 id="examples">Answers side by side</h2>
<div class="controls"><label>search <input type="search" id="search"></label>
<label>row <select id="pick"></select></label>
<button type="button" id="previous">previous</button><button type="button" id="next">next</button>
<span id="position" class="soft" role="status"></span>
<label><input type="checkbox" id="all"> every checkpoint</label></div>
<div class="pair"><div><h3>Prompt</h3><pre id="asked" tabindex="0"></pre></div>
<div id="known"><h3>Reference</h3><pre id="wanted" tabindex="0"></pre></div></div>
<div class="cards" id="cards"></div>
<p class="soft">Your own prompts where there are any, the first rows, the most improved and most worsened ones, then as
many as fit; all are in evaluation/NAME/outputs.jsonl.</p>
"""


def _ledger(run: RunFiles) -> str:
    if run.ledger is None:
        return ""
    parts = []
    for name in ("rows", "tokens", "turns", "skipped", "repaired", "overflow", "findings"):
        if counts := run.ledger.get(name):
            rows = [([key, f"{value:,}"], False) for key, value in counts.items()]
            parts.append(f"<div><h3>{escape(name)}</h3>{table([name, 'number'], rows)}</div>")
    histogram = (run.ledger.get("lengths") or {}).get("histogram") or {}
    bars = f"<h3>Tokens a conversation</h3>{_bars(histogram)}" if histogram else ""
    return f'<h2 id="ledger">Data ledger</h2>\n<div class="pair">{"".join(parts)}</div>{bars}\n'


def _preview(run: RunFiles) -> str:
    """The first train rows, token by token."""
    if not run.preview:
        return ""
    rows = "".join(_previewed(row) for row in run.preview)
    return (
        '<h2 id="preview">What is learned</h2>\n<p class="soft">The first train rows, token by token: '
        '<span class="learned">underlined and coloured</span> is learned, the rest is context.</p>\n'
        f"{rows}"
    )


def _previewed(row: dict[str, Any]) -> str:
    parts = []
    for number, (text, supervised) in enumerate(row["tokens"]):
        kind = ("learned" if supervised else "context") + (" odd" if number % 2 else "")
        parts.append(f'<span class="{kind}">{escape(text).replace(chr(10), "⏎" + chr(10))}</span>')
    more = f" ... and {row['left_out']:,} tokens more" if row["left_out"] else ""
    return f'<h3>{escape(row["title"])}</h3>\n<pre class="tokens" tabindex="0">{"".join(parts)}{more}</pre>\n'


def _bars(histogram: dict[str, int]) -> str:
    """A bar for each bin, named by its lower edge."""
    most, height = max(histogram.values()), 22
    lines = []
    for place, (edge, count) in enumerate(histogram.items()):
        y = place * height
        lines.append(
            f'<text x="70" y="{y + 15}" text-anchor="end">{escape(edge)}+</text>'
            f'<rect class="bar" x="78" y="{y + 3}" width="{count / most * 460:.1f}" height="{height - 6}"/>'
            f'<text x="{84 + count / most * 460:.1f}" y="{y + 15}">{count:,}</text>'
        )
    size = f'viewBox="0 0 620 {len(histogram) * height}"'
    return f'<svg {size} role="img" aria-label="Conversations by their number of tokens">{"".join(lines)}</svg>'


def _speed(run: RunFiles) -> str:
    timed = [line for line in run.steps if line.get("seconds")]
    if not timed:
        return ""
    memory = [line["peak_memory_mb"] for line in timed if line.get("peak_memory_mb")]
    rates = {
        "steps": f"{len(run.steps):,}",
        "seconds, all steps": f"{sum(line['seconds'] for line in timed):,.0f}",
        "seconds a step, median": f"{median(line['seconds'] for line in timed):.2f}",
        "tokens a second": f"{_rate(timed, 'tokens'):,.0f}",
        "supervised tokens a second": f"{_rate(timed, 'supervised_tokens'):,.0f}",
        "peak memory": f"{max(memory) / 1000:.2f} GB" if memory else "not recorded",
    }
    return f'<h2 id="speed">Speed and memory</h2>\n{table(["", ""], [(list(item), False) for item in rates.items()])}\n'


def _rate(lines: list[dict[str, Any]], key: str) -> float:
    return sum(line.get(key) or 0 for line in lines) / sum(line["seconds"] for line in lines)


def _origin(run: RunFiles) -> str:
    return (
        f'<h2 id="recipe">Recipe and environment</h2>\n<details open><summary>recipe.yaml</summary>'
        f'<pre tabindex="0">{escape(run.recipe)}</pre></details>\n{_environment(run.environment)}'
        f'<p class="soft">This page was written with {escape(environment())}.</p>\n'
    )


def _environment(found: dict[str, Any] | None) -> str:
    """With what it was trained, as training has noted it."""
    if found is None:
        return ""
    devices = ", ".join(found["devices"]) or "no GPU"
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    said = f"Python {found['python']} on {found['system']}, {found['cores']} cores, {devices}; {packages}"
    if "precision" in found:  # runs of earlier versions do not say
        said = f"{found['precision']} arithmetic, {said}"
    return f'<p id="environment">Trained with {escape(said)}.</p>\n'
