"""The page of a run: one file that opens offline, loads nothing from anywhere, and shows untrusted text as text."""

from contextlib import suppress
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from minisft.errors import UserError
from minisft.files import write_atomically
from minisft.metric_names import metric_title
from minisft.report.gains import gains_section
from minisft.report.html import CURVE_CONTROLS, environment, scrolling_table, table, whole_page
from minisft.report.judge_section import benchmark_tables, judge_tables
from minisft.report.run_data import RunFiles, figure_id, metrics_of, page_data, read_run
from minisft.report.tables import directed_title, format_metric, score_table, tested_metric
from minisft.report.verdict import verdict
from minisft.results import is_reliable, unreliability_reason
from minisft.text import duration
from minisft.yaml_tree import parse

_KIND = "MiniSFT report"
_REPORT_FILES = ("report.html", "results.md", "evaluation")
_LEDGER_TABLES = ("rows", "tokens", "turns", "skipped", "repaired", "overflow", "findings")

# page.js fills the elements with an id.
_LOSS = f"""<h2 id="curves">Loss</h2>
{CURVE_CONTROLS}
<figure id="loss"><figcaption>Mean over supervised tokens: <span class="key0">each training step</span>, and
<span class="key1">the held-out rows at each checkpoint</span>.</figcaption></figure>
"""
_EXAMPLES = """<h2 id="examples">Answers side by side</h2>
<div class="controls"><label>model <select id="system"></select></label>
<label>order <select id="order"><option value="worst">worst first</option>
<option value="worsened">most worsened first</option><option value="improved">most improved first</option>
<option value="file">as in the data</option></select></label>
<label>by <select id="metric"></select></label>
<label>mark words that differ from <select id="against"><option value="reference">the reference</option>
<option value="base">the base model</option><option value="nothing">nothing</option></select></label></div>
<div class="controls"><label>search <input type="search" id="search"></label>
<label>row <select id="pick"></select></label>
<button type="button" id="previous">previous</button><button type="button" id="next">next</button>
<span id="position" class="soft" role="status"></span>
<label><input type="checkbox" id="all"> every checkpoint</label></div>
<div class="pair shown"><div><h3>Prompt</h3><pre id="asked" tabindex="0"></pre></div>
<div id="known"><h3>Reference</h3><pre id="wanted" tabindex="0"></pre></div></div>
<div class="cards" id="cards"></div>
<div class="printed" id="printed"></div>
<p class="soft">In an answer, words that the other text does not have are <del>struck out</del>; in the reference, words
that the answer lacks are <ins>underlined</ins>. The page holds your own prompts, if there are any, the worst answers of
every model, the most worsened and most improved ones, and as many others as fit, in a random order;
evaluation/NAME/outputs.jsonl holds all of them.</p>
"""
_SECTIONS = {
    "scores": "Scores", "gains": "Gained and lost", "judge": "Judge", "benchmarks": "Benchmarks", "examples": "Answers",
    "curves": "Loss", "by-source": "Sources", "ledger": "Data", "preview": "What is learned", "speed": "Speed",
    "recipe": "Recipe",
}  # fmt: skip


def require_target(folder: Path) -> None:
    """Refuse to write a report into a folder that holds anything other than an earlier report.

    Raises:
        UserError: The folder is a file, or holds something else; the message names one of these files.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(folder, "this is a file, and a report is written into a folder", "name a folder")
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name not in _REPORT_FILES]
    page = folder / "report.html"
    is_report = page.is_file() and f"{_KIND}</title>".encode() in page.read_bytes()[:4096]
    if others or (names and not is_report):
        holds = f" (it holds {others[0]!r})" if others else ""
        raise UserError(folder, f"this folder holds something other than a report{holds}", "name a new or empty folder")


def write_report(output: Path, to: Path | None = None) -> Path:
    """Write `report.html` of the run folder `output`, into it or into the folder `to`.

    Returns:
        The path of the page.

    Raises:
        UserError: The folder is not a run folder.
    """
    run = read_run(output)
    path, data = (to or output) / "report.html", page_data(run)
    write_atomically(path, whole_page(output.resolve().name, _KIND, _body(run, data["sources"]), data, "page.js"))
    return path


def _body(run: RunFiles, sources: list[dict[str, Any]]) -> str:
    """Return the sections of the page for which the run folder holds the files.

    Args:
        run: The files of the run.
        sources: The loss of each source, of `page_data`.
    """
    # 1. The overview: the verdict, the figures that matter, and the commands that start a conversation.
    best = run.results["best"] if run.results else None
    folder = run.root / "checkpoints" / best if best else run.root
    overview = [
        f'<p class="verdict">{escape(verdict(run))}</p>\n',
        _tiles(run),
        f"<p>Talk to it: <code>minisft chat {escape(str(folder))}</code>, or in the browser, next to the base model "
        f"and every checkpoint: <code>minisft serve {escape(str(run.root))}</code></p>\n",
    ]

    # 2. The scores, the answers side by side, and the curves.
    parts: list[str] = []
    if run.results is not None:
        parts += [_scores(run, run.results), gains_section(run)]
        sections = (judge_tables(run.results), benchmark_tables(run.results))
        parts += [*(section.as_html() for section in sections if section is not None), _EXAMPLES]
    if run.steps or run.systems:
        parts += [_LOSS, _sources(sources)]

    # 3. The data.
    parts += [_ledger(run), _preview(run)]

    # 4. Speed and memory.
    timed = [line for line in run.steps if line.get("seconds")]
    if timed:
        seconds = sum(line["seconds"] for line in timed)
        tokens, supervised = (sum(line.get(key) or 0 for line in timed) for key in ("tokens", "supervised_tokens"))
        memory = [line["peak_memory_mb"] for line in timed if line.get("peak_memory_mb")]
        figures = {
            "steps": f"{len(run.steps):,}",
            "seconds, all steps": f"{seconds:,.0f}",
            "seconds per step, median": f"{median(line['seconds'] for line in timed):.2f}",
            "tokens per second": f"{tokens / seconds:,.0f}",
            "supervised tokens per second": f"{supervised / seconds:,.0f}",
            "peak memory": f"{max(memory) / 1000:.2f} GB" if memory else "not recorded",
        }
        rows = [([name, text], False) for name, text in figures.items()]
        parts.append(f'<h2 id="speed">Speed and memory</h2>\n{table(["", ""], rows)}\n')

    # 5. The recipe, the environment of the training, and that of this page.
    parts.append(
        '<h2 id="recipe">Recipe and environment</h2>\n<details open><summary>recipe.yaml</summary>'
        f'<pre tabindex="0">{escape(run.recipe)}</pre></details>\n'
    )
    if (recorded := run.environment) is not None:
        devices = ", ".join(recorded["devices"]) or "no GPU"
        packages = ", ".join(f"{name} {version}" for name, version in recorded["packages"].items())
        text = f"Python {recorded['python']} on {recorded['system']}, {recorded['cores']} cores, {devices}; {packages}"
        if "precision" in recorded:  # runs of earlier versions do not record it
            text = f"{recorded['precision']} arithmetic, {text}"
        parts.append(f'<p id="environment">Trained with {escape(text)}.</p>\n')
        if probe := recorded.get("probe"):
            parts.append(f'<p id="probe">{escape(_probe_text(probe))}</p>\n')
    parts.append(f'<p class="soft">This page was written with {escape(environment())}.</p>\n')

    # 6. Links to the sections that there are.
    body = "".join(parts)
    links = [f'<a href="#{key}">{name}</a>' for key, name in _SECTIONS.items() if f'<h2 id="{key}">' in body]
    return f'<nav aria-label="Sections">{"".join(links)}</nav>\n{"".join(overview)}{body}'


def _tiles(run: RunFiles) -> str:
    """Return the best score, the loss, the time, the cost and the data of a run, as far as its files tell them."""
    tiles: list[tuple[str, str, list[str]]] = []  # name, figure, notes

    # 1. Score and loss of the best checkpoint, beside those of the base model.
    base, best = (run.results["base"], run.best) if run.results else ({}, None)
    if best is not None and run.results is not None and (metrics := metrics_of(run)):
        # The metric that chose the best checkpoint, if results.json names it and it is one of the scores.
        wanted = run.results.get("best_by", {}).get("metric")
        key = wanted if wanted in metrics else metrics[0]
        bounds = [format_metric(key, {"score": best[key][end]}, interval=False) for end in ("low", "high")]
        interval = f"95 %: {' to '.join(bounds)}" if is_reliable(best[key]) else ""
        constant = format_metric(key, run.results["constant"].get(key), interval=False)
        others = f"base {format_metric(key, base[key], interval=False)}" + (
            f", constant {constant}" if constant else ""
        )
        score = format_metric(key, best[key], interval=False)
        tiles.append((f"{metric_title(key)} of {best['checkpoint']}", score, [interval, others]))
    if best is not None and best.get("loss") is not None:
        before = f"base {base['loss']:.4g}" if base.get("loss") is not None else ""
        tiles.append(("held-out loss", f"{best['loss']:.4g}", [before, f"perplexity {best['perplexity']:.4g}"]))
    elif losses := [line["loss"] for line in run.steps if line.get("loss") is not None]:
        tiles.append(("training loss, last step", f"{losses[-1]:.4g}", [f"{losses[0]:.4g} in the first step"]))

    # 2. Time and cost of the training; those of the evaluation as a note.
    timed = [line for line in run.steps if line.get("seconds")]
    if timed:
        seconds = sum(line["seconds"] for line in timed)
        supervised = sum(line.get("supervised_tokens") or 0 for line in timed)
        tiles.append(
            (
                "training time",
                duration(seconds),
                [f"{len(timed):,} steps", f"{supervised / seconds:,.0f} supervised tokens/s"],
            )
        )
        unit = "GPU" if (run.environment or {}).get("devices") else "process"
        processes = _processes(run)
        memory = [line["peak_memory_mb"] for line in timed if line.get("peak_memory_mb")]
        scoring = sum(entry.get("seconds") or 0 for _, entry in run.systems)
        notes = [
            f"at most {max(memory) / 1000:.2f} GB a process" if memory else "",
            f"and {duration(scoring)} to score" if scoring else "",
        ]
        tiles.append((f"{unit} hours", f"{processes * seconds / 3600:.2g}", notes))

    # 3. The data.
    rows = (run.ledger or {}).get("rows", {})
    if "train" in rows:
        supervised = (run.ledger or {}).get("tokens", {}).get("supervised")
        notes = [f"{rows.get('test', 0):,} held out", f"{supervised:,} supervised tokens" if supervised else ""]
        tiles.append(("conversations to learn", f"{rows['train']:,}", notes))
    parts = []
    for name, figure, notes in tiles:
        lines = "".join(f"<dd>{escape(note)}</dd>" for note in notes if note)
        parts.append(f'<div><dt>{escape(name)}</dt><dd class="figure">{escape(figure)}</dd>{lines}</div>')
    return f'<dl class="tiles">{"".join(parts)}</dl>\n' if parts else ""


def _processes(run: RunFiles) -> int:
    """Return the number of processes that trained, which recipe.yaml tells; 1 if it does not."""
    with suppress(UserError, AttributeError, TypeError, ValueError):
        return int(parse(run.recipe, "recipe.yaml").plain().get("training", {}).get("processes") or 1)
    return 1


def _sources(curves: list[dict[str, Any]]) -> str:
    """Return the figure and the table of the loss by source; nothing for a run with one source."""
    if not curves:
        return ""
    keys = ", ".join(f'<span class="key{place % 8}">{escape(one["short"])}</span>' for place, one in enumerate(curves))
    rows = [
        (
            [
                one["name"],
                f"{one['tokens']:,}",
                *("" if one[at] is None else f"{one[at]:.4f}" for at in ("first", "last")),
            ],
            False,
        )
        for one in curves
    ]
    heads = ["source", "supervised tokens", "loss, first tenth of its steps", "last tenth"]
    return (
        '<h2 id="by-source">Loss by source</h2>\n<figure id="sources"><figcaption>Mean over the supervised tokens of '
        f"each source in a training step: {keys}.</figcaption></figure>\n"
        f"{scrolling_table('by-source', heads, rows)}"
    )


def _probe_text(probe: dict[str, Any]) -> str:
    """Return what the probe before the first step found, in one sentence for each finding."""
    verdicts = {
        "right": "rows of several conversations are computed as each conversation alone",
        "alone": "each conversation has a row of its own, since rows of several are computed otherwise",
    }
    measured = {
        "after another conversation in its row": probe.get("isolation"),
        "against transformers' own attention": probe.get("exactness"),
        "before a token that changes": probe.get("causality"),
        "beyond the model's window": probe.get("window"),
    }
    sizes = ", ".join(f"{size:.1e} {name}" for name, size in measured.items() if size is not None)
    text = f"The model was probed before the first step: {verdicts.get(probe['verdict'], probe['verdict'])}."
    if attention := probe.get("attention"):
        text += f" Attention: {attention}."
    if sizes:
        text += f" Largest relative differences of logits: {sizes} (allowed: {probe['tolerance']:.0e})."
    if frozen := probe.get("frozen"):
        more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        text += f" Frozen, since no loss reaches them: {', '.join(frozen[:3])}{more}."
    return text


def _scores(run: RunFiles, results: dict[str, Any]) -> str:
    """Return a figure for each metric, the table and its notes; without held-out answers, only the failures."""
    failures = "".join(
        f'<p class="bad">{escape(f["checkpoint"])} could not be scored: {escape(f["error"])}</p>'
        for f in results.get("failed", [])
    )
    failures += "".join(
        f'<p class="bad">{escape(f["metric"])} could not be computed: {escape(f["error"])}</p>'
        for f in results.get("failed_metrics", [])
    )
    metrics = metrics_of(run)
    if not metrics:
        return failures
    intervals = "Bars: 95 % intervals. " if is_reliable(results) else ""
    figures = "".join(
        f'<figure id="{escape(figure_id(metric), quote=True)}"><figcaption>{escape(directed_title(results, metric))}'
        "</figcaption></figure>"
        for metric in metrics
    )
    if is_reliable(results):
        significance = (
            f"p is the p-value of the difference in {escape(metric_title(tested_metric(run)))} from base, constant and "
            "best (paired bootstrap)"
        )
    else:
        significance = unreliability_reason(results)
    constant = escape(repr(results["constant"].get("text", "")))
    of_set = f" of {next(iter(sets))}" if (sets := results.get("test_sets")) else ""
    return (
        f'<h2 id="scores">Scores on {results.get("answers", "the")} held-out answers{escape(of_set)}</h2>\n'
        f'<div class="pair">{figures}</div>\n<p class="soft">{intervals}Dotted: the constant baseline. A click on a '
        f"point shows the worst answers behind it.</p>\n{scrolling_table('scores', *score_table(run))}{failures}"
        '<p class="soft">A score in the table leads to the worst answers behind it. constant is the constant baseline: '
        f"every prompt is answered with {constant}, the training answer that scores best. {significance}.</p>\n"
    )


def _ledger(run: RunFiles) -> str:
    """Return the counts of the data ledger, and the histogram of the conversations' lengths."""
    if run.ledger is None:
        return ""
    tables = []
    for name in _LEDGER_TABLES:
        if counts := run.ledger.get(name):
            rows = [([key, f"{count:,}"], False) for key, count in counts.items()]
            tables.append(f"<div><h3>{escape(name)}</h3>{table([name, 'number'], rows)}</div>")
    if unrolled := run.ledger.get("unrolled"):
        counts = {name: number for name, number in unrolled.items() if name != "rows"}
        counts |= {f"rows of {split}": number for split, number in unrolled["rows"].items()}
        rows = [([key.replace("_", " "), f"{count:,}"], False) for key, count in counts.items()]
        tables.append(f"<div><h3>unrolled</h3>{table(['one row per answer', 'number'], rows)}</div>")

    # A bar for each bin, named by its lower edge.
    histogram = (run.ledger.get("lengths") or {}).get("histogram") or {}
    height = 22
    bars = []
    for index, (edge, count) in enumerate(histogram.items()):
        y, width = index * height, count / max(histogram.values()) * 460
        bars.append(
            f'<text x="70" y="{y + 15}" text-anchor="end">{escape(edge)}+</text>'
            f'<rect class="bar" x="78" y="{y + 3}" width="{width:.1f}" height="{height - 6}"/>'
            f'<text x="{84 + width:.1f}" y="{y + 15}">{count:,}</text>'
        )
    lengths = ""
    if bars:
        lengths = (
            f'<h3>Tokens per conversation</h3><svg viewBox="0 0 620 {len(bars) * height}" role="img" '
            f'aria-label="Number of conversations by tokens per conversation">{"".join(bars)}</svg>'
        )
    return f'<h2 id="ledger">Data ledger</h2>\n<div class="pair">{"".join(tables)}</div>{lengths}\n'


def _preview(run: RunFiles) -> str:
    """Return the first train rows, token by token, with the supervised tokens marked."""
    if not run.preview:
        return ""
    parts = [
        '<h2 id="preview">What is learned</h2>\n<p class="soft">The first train rows, token by token: '
        '<span class="learned">underlined and coloured</span> is learned, the rest is context.</p>\n'
    ]
    for row in run.preview:
        tokens = []
        for index, (text, supervised) in enumerate(row["tokens"]):
            kind = ("learned" if supervised else "context") + (" odd" if index % 2 else "")
            tokens.append(f'<span class="{kind}">{escape(text).replace(chr(10), "⏎" + chr(10))}</span>')
        more = f" ... and {row['left_out']:,} tokens more" if row["left_out"] else ""
        parts.append(
            f'<h3>{escape(row["title"])}</h3>\n<pre class="tokens" tabindex="0">{"".join(tokens)}{more}</pre>\n'
        )
    return "".join(parts)
