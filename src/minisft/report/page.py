"""One self-contained page of a run: opens offline, asks nobody for anything, and shows foreign text as text."""

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from minisft.files import write_atomically
from minisft.report.html import environment, rounded, table, whole_page
from minisft.report.run_files import RunFiles, read_lines, read_run
from minisft.report.verdict import verdict

CURVE_POINTS = 1500
EXAMPLE_BYTES = 1_500_000  # of example text on the page; all of it lies in outputs.jsonl
CHANGED = 5  # most improved rows on the page, and as many most worsened
_NAMES = {"bleu": "BLEU", "chrf": "chrF"}


def write_report(output: Path) -> Path:
    """Write `<output>/report.html` from what the run folder holds.

    Returns:
        The page's path.

    Raises:
        UserError: the folder is no run.
    """
    run = read_run(output)
    name = output.resolve().name
    sections = [_verdict(run), _curves(run), _scores(run), _examples(run), _ledger(run), _speed(run), _origin(run)]
    page = whole_page(name, "MiniSFT report", "".join(sections), _page_data(run), "page.js")
    path = output / "report.html"
    write_atomically(path, page)
    return path


# --- what the scripts draw ---------------------------------------------------------------------------------


def _page_data(run: RunFiles) -> dict[str, Any]:
    losses = [(line["step"], line["loss"]) for line in run.steps if line.get("loss") is not None]
    stride = max(1, len(losses) // CURVE_POINTS)
    return {
        "train": [[step, rounded(loss)] for step, loss in losses[::stride]],
        "test": [[step, rounded(loss)] for step, loss in run.held_out],
        "scores": _score_points(run),
        "systems": [name for name, _ in run.systems],
        "best": run.results["best"] if run.results else None,
        "scoreName": "chrF" if "chrf" in _metrics(run) else "BLEU",
        "examples": _example_rows(run),
    }


def _score_points(run: RunFiles) -> dict[str, Any] | None:
    if run.results is None:
        return None
    points = {}
    for metric in _metrics(run):
        scores = [(entry["step"], entry[metric]) for _, entry in run.systems]
        points[metric] = {
            "points": [[step, *(rounded(s[key]) for key in ("score", "low", "high"))] for step, s in scores],
            "constant": rounded(run.results["constant"][metric]["score"]),
        }
    return points


def _example_rows(run: RunFiles) -> list[dict[str, Any]]:
    """Rows with the answer of every system: the first, the most changed, then as many as there is room for."""
    lines = [read_lines(run.root / "evaluation" / name / "outputs.jsonl") for name, _ in run.systems]
    if not lines or not all(len(rows) == len(lines[0]) for rows in lines):
        return []
    metric = "chrf" if "chrf" in _metrics(run) else "bleu"
    examples, spent = [], 0
    for place, title in _order(run, lines, metric):
        rows = [system[place] for system in lines]
        example = _example_row(rows, title, metric)
        spent += len(json.dumps(example, ensure_ascii=False).encode())
        if spent > EXAMPLE_BYTES:
            break
        examples.append(example)
    return examples


def _example_row(rows: list[dict[str, Any]], title: str, metric: str) -> dict[str, Any]:
    texts = list(dict.fromkeys(row["output"] for row in rows))  # many checkpoints give the same answer
    place = {text: number for number, text in enumerate(texts)}
    return {
        "title": f"{rows[0]['id']}, answer {rows[0]['turn']}{title}",
        "prompt": rows[0]["prompt"],
        "reference": rows[0]["reference"],
        "texts": texts,
        "outputs": [place[row["output"]] for row in rows],
        "scores": [round(row[metric], 1) if metric in row else None for row in rows],
    }


def _order(run: RunFiles, lines: list[list[dict[str, Any]]], metric: str) -> Iterable[tuple[int, str]]:
    """(row, what is special about it): first rows, most improved, most worsened, all others."""
    names = [name for name, _ in run.systems]
    best = run.results["best"] if run.results else None
    titles = dict.fromkeys(range(min(3, len(lines[0]))), "")
    if best in names and lines[0] and metric in lines[0][0]:
        after = lines[names.index(best)]
        gains = [late[metric] - early[metric] for early, late in zip(lines[0], after, strict=True)]
        order = sorted(range(len(gains)), key=lambda row: -gains[row])
        for rows, word in ((order[:CHANGED], "improved"), (order[::-1][:CHANGED], "worsened")):
            for row in rows:
                if (gains[row] > 0) == (word == "improved") and gains[row]:
                    titles[row] = f" ({word}: {gains[row]:+.1f} {_NAMES[metric]})"
    yield from titles.items()
    yield from ((row, "") for row in range(len(lines[0])) if row not in titles)


# --- the sections ------------------------------------------------------------------------------------------


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
    if run.results is None:
        return ""
    metrics = _metrics(run)
    figures = [
        f'<figure id="{m}"><figcaption>{_NAMES[m]}, 95 % intervals; dotted: the constant answer.</figcaption></figure>'
        for m in metrics
    ]
    heads = ["", "step", "loss", "perplexity", *(_NAMES[m] for m in metrics), "p against base", "exact", "seconds"]
    rows = [_score_row(name, entry, run) for name, entry in [*run.systems, ("constant", run.results["constant"])]]
    failed = [
        f'<p class="bad">{escape(f["checkpoint"])} could not be scored: {escape(f["error"])}</p>'
        for f in run.results.get("failed", [])
    ]
    constant = escape(repr(run.results["constant"].get("text", "")))
    return (
        f'<h2 id="scores">Scores on {run.results.get("answers", "the")} held-out answers</h2>\n'
        f'<div class="pair">{"".join(figures)}</div>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="scores">{table(heads, rows)}</div>\n'
        f'{"".join(failed)}<p class="soft">constant is the train answer that scores best when it is always given: '
        f"{constant}.</p>\n"
    )


def _score_row(name: str, entry: dict[str, Any], run: RunFiles) -> tuple[list[str], bool]:
    metrics = _metrics(run)
    p = entry[metrics[0]].get("p", {}).get("base") if metrics else None
    cells = [name, entry.get("step"), entry.get("loss"), entry.get("perplexity")]
    scores = [f"{entry[m]['score']:.1f} [{entry[m]['low']:.1f}, {entry[m]['high']:.1f}]" for m in metrics]
    ends = [p, f"{100 * entry.get('exact_match', 0):.0f} %", entry.get("seconds")]
    best = run.results is not None and name == run.results["best"]
    return [_cell(cell) for cell in (*cells, *scores, *ends)], best


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
<div><h3>Reference</h3><pre id="wanted" tabindex="0"></pre></div></div>
<div class="cards" id="cards"></div>
<p class="soft">The first rows, the most improved and most worsened ones, then as many as fit; all are in
evaluation/NAME/outputs.jsonl.</p>
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
        f'<pre tabindex="0">{escape(run.recipe)}</pre></details>\n'
        f'<p class="soft">This page was written with {escape(environment())}.</p>\n'
    )


# --- small things ------------------------------------------------------------------------------------------


def _metrics(run: RunFiles) -> list[str]:
    return [metric for metric in _NAMES if run.results is not None and metric in run.results["base"]]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
