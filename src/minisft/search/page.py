"""The page of a search: one file that opens offline, from `search.json` and the metric logs of the trials."""

import math
from html import escape
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_json, write_atomically
from minisft.report.comparison import curves_section
from minisft.report.html import environment, scrolling_table, whole_page
from minisft.report.tables import format_score
from minisft.results import METRIC_NAMES
from minisft.run_folder import RunFolder, read_metrics
from minisft.search.charts import Mark, bar_chart, in_drawing_order, parallel_chart, slice_chart, style, text_of

_STATES = {"complete": "ran to the end", "pruned": "stopped early", "failed": "failed"}
_KINDS = {  # the legend of all charts, in the order in which it is read
    "best": "the best trial",
    "tied": "cannot be told apart from it",
    "worse": "worse",
    "stopped": "stopped early, so with fewer steps",
}
_NOTES = """<p class="soft">Trials are compared row by row on the same held-out rows (paired bootstrap, model confidence
set), so two trials may differ although their intervals overlap. A trial that was stopped early has the {objective} of
its last rung.</p>
"""


def write_search_page(output: Path) -> Path:
    """Write `search.html` into a search's folder, from its `search.json` and the runs of its trials.

    Returns:
        The path of the page.

    Raises:
        UserError: There is no search.json, or it or a trial's metrics.jsonl is damaged.
    """
    study = _read_study(output)
    path = output / "search.html"
    body, data = _body(output, study)
    write_atomically(path, whole_page(output.resolve().name, "MiniSFT search", body, data, "comparison.js"))
    return path


def search_verdict(study: dict[str, Any]) -> list[str]:
    """Return what a search found, in sentences.

    Args:
        study: The content of search.json.
    """
    trials = {trial["number"]: trial for trial in study["trials"]}
    counts = [(sum(t["state"] == state for t in trials.values()), text) for state, text in _STATES.items()]
    listed = ", ".join(f"{count} {text}" for count, text in counts if count)
    number = len(trials)
    overview = f"{number} trial{'s' if number != 1 else ''}{f': {listed}' if listed else ''}."
    if study["best"] is None:
        return [f"No trial has finished. {overview}"]
    name, best = _objective_name(study), trials[study["best"]["number"]]
    sentences = [
        f"Trial {best['number']} is best, with {settings_text(best['settings'])}: {name} {_objective_text(best)}.",
        overview,
    ]
    tied = [number for number in study["indistinguishable"] if number in trials]
    if not tied:
        sentences.insert(1, "Every other trial is worse than it by more than chance.")
    elif len(tied) == 1:
        sentences.insert(1, f"Trial {tied[0]} cannot be told apart from it.")
    else:
        sentences.insert(1, f"{len(tied)} trials cannot be told apart from it: {', '.join(map(str, sorted(tied)))}.")
    cheapest = study.get("cheapest")
    if tied and cheapest in trials and cheapest != best["number"]:
        settings = settings_text(trials[cheapest]["settings"])
        sentences.insert(2, f"The cheapest of these settings is that of trial {cheapest}: {settings}.")
    elif tied and cheapest == best["number"]:
        sentences.insert(2, "It is also the cheapest of these.")
    return sentences


def settings_text(settings: dict[str, Any]) -> str:
    """Return a trial's settings as `key=value, ...`, or "the recipe as it is" if it changes none."""
    return ", ".join(f"{key}={text_of(value)}" for key, value in settings.items()) or "the recipe as it is"


def _read_study(output: Path) -> dict[str, Any]:
    """Read `search.json`.

    Raises:
        UserError: It does not exist or is damaged.
    """
    path = output / "search.json"
    if not path.is_file():
        raise UserError(path, "there is no search in this folder", "give the output folder of `minisft search`")
    fix = "run `minisft search` with --resume, which writes it again: no trial is run twice"
    fields: Any = {"objective": str, "trials": list, "best": (dict, type(None)), "indistinguishable": list}
    study = {"test": {}, "importance": {}, **read_json(path, fix, **fields)}
    for index, trial in enumerate(study["trials"]):
        whole = isinstance(trial, dict) and isinstance(trial.get("number"), int)
        if not (whole and isinstance(trial.get("settings"), dict) and trial.get("state") in _STATES):
            problem = f"this file is damaged (trial {index} lacks number, settings or a state of {', '.join(_STATES)})"
            raise UserError(path, problem, fix)
    numbers = [trial["number"] for trial in study["trials"]]
    if study["best"] is not None and study["best"].get("number") not in numbers:
        raise UserError(path, "this file is damaged (its best trial is none of its trials)", fix)
    return study


def _objective_name(study: dict[str, Any]) -> str:
    """Return the objective as the page names it."""
    return "held-out loss" if study["objective"] == "loss" else METRIC_NAMES.get(study["objective"], study["objective"])


def _objective_text(trial: dict[str, Any]) -> str:
    """Return the objective of a trial with its interval; "" if it has none."""
    value, low, high = (trial.get(key) for key in ("objective", "low", "high"))
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _mark(trial: dict[str, Any], study: dict[str, Any]) -> Mark:
    """Return a trial as the charts draw it."""
    number, objective = trial["number"], trial.get("objective")
    if objective is not None and not math.isfinite(objective):
        objective = None
    if study["best"] is not None and number == study["best"]["number"]:
        kind = "best"
    elif number in study["indistinguishable"]:
        kind = "tied"
    else:
        kind = "worse" if trial["state"] == "complete" else "stopped"
    title = f"trial {number} ({_STATES[trial['state']]}): {settings_text(trial['settings'])}"
    if objective is not None:
        title += f": {_objective_text(trial)}"
    return Mark(title, trial["settings"], objective, trial.get("low"), trial.get("high"), kind)


def _body(output: Path, study: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the sections of the page as HTML, and the data of the script that draws its curves."""
    name, trials = _objective_name(study), study["trials"]
    marks = [_mark(trial, study) for trial in trials]
    legend = ", ".join(
        f'<span class="{_key_class(kind)}">{text}</span>'
        for kind, text in _KINDS.items()
        if any(mark.kind == kind for mark in marks)
    )

    # 1. The verdict, and the errors of failed trials.
    lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in search_verdict(study))
    parts = [f'<div class="verdict">{lines}</div>\n']
    for trial in trials:
        if trial["state"] == "failed":
            parts.append(
                f'<p class="bad">Trial {trial["number"]} failed, the others continued: '
                f"{escape(settings_text(trial['settings']))}</p>\n"
            )
            if trial.get("error"):
                parts.append(f'<pre tabindex="0">{escape(str(trial["error"]))}</pre>\n')

    # 2. The recipe to use, and the scores on the test rows.
    parts += [_recipes(output, study), _test_scores(study)]

    # 3. A slice for each key, and how much each key matters.
    keys = list(dict.fromkeys(key for trial in trials for key in trial["settings"]))
    slices = {key: slice_chart(key, marks, name) for key in keys}
    figures = "".join(
        f"<figure>{chart}<figcaption>{escape(f'{name[:1].upper()}{name[1:]} by {key}')}, 95 % intervals.</figcaption>"
        "</figure>\n"
        for key, chart in slices.items()
        if chart
    )
    if figures:
        parts.append(
            f'<h2 id="slices">Each key</h2>\n<p class="soft">{legend}.</p>\n<div class="pair">{figures}</div>\n'
        )
    if study["importance"]:
        chart = bar_chart(study["importance"], "Importance")
        parts.append(
            f'<h2 id="importance">Importance of the keys</h2>\n<figure>{chart}<figcaption>Share of the differences in '
            f"{escape(name)} that the values of the key explain, as Optuna estimates it.</figcaption></figure>\n"
        )
    if len(keys) > 1 and (chart := parallel_chart(keys, marks, name)):
        parts.append(
            f'<h2 id="parallel">All keys of each trial</h2>\n<figure>{chart}<figcaption>A line is a trial: {legend}.'
            "</figcaption></figure>\n"
        )

    # 4. The curves, those of the best trial last, so that nothing covers them.
    runs = {f"trial {trial['number']}": output / str(trial.get("run") or "") for trial in trials if trial.get("run")}
    drawn = [f"trial {trials[marks.index(mark)]['number']}" for mark in in_drawing_order(marks)]
    steps = {name: read_metrics(RunFolder(runs[name])) for name in drawn if name in runs}
    steps = {name: lines for name, lines in steps.items() if lines}
    styles = [style(mark.kind) for mark, name in zip(in_drawing_order(marks), drawn, strict=True) if name in steps]
    section, data = curves_section(steps, styles, legend)
    parts.append(section)

    # 5. All trials.
    heads = ["trial", *keys, "state", "steps", name, "run"]
    rows = [
        (
            [
                str(trial["number"]),
                *(text_of(trial["settings"][key]) if key in trial["settings"] else "" for key in keys),
                "cannot be told apart" if mark.kind == "tied" else "best" if mark.kind == "best" else trial["state"],
                "" if trial.get("steps") is None else f"{trial['steps']:,}",
                _objective_text(trial),
                str(trial.get("run") or ""),
            ],
            mark.kind == "best",
        )
        for trial, mark in zip(trials, marks, strict=True)
    ]
    parts.append(
        f'<h2 id="trials">Trials</h2>\n{scrolling_table("trials", heads, rows)}{_NOTES.format(objective=escape(name))}'
        '<p class="soft">Each is a run folder, which evaluate, chat, report and export accept.</p>\n'
        f'<p class="soft">This page was written with {escape(environment())}.</p>\n'
    )
    return "".join(parts), data


def _key_class(kind: str) -> str:
    """Return the class of page.css that gives text the colour of a kind of trial."""
    return style(kind).split()[0].replace("c", "key")


def _recipes(output: Path, study: dict[str, Any]) -> str:
    """Return the recipes of the best trial as YAML: that of its own run, and that for training on all rows."""
    if study["best"] is None:
        return ""
    parts: list[str] = []
    for key, title in (
        ("recipe", "reproduces the best trial"),
        ("recipe_all_data", "trains on all rows: a second run"),
    ):
        path = study["best"].get(key)
        if path and (output / path).is_file():
            text = (output / path).read_text(encoding="utf-8", errors="replace")
            opened = "" if parts else " open"
            parts.append(
                f"<details{opened}><summary>{escape(str(path))} {title}</summary>"
                f'<pre tabindex="0">{escape(text)}</pre></details>\n'
            )
    return f'<h2 id="recipe">The recipe to use</h2>\n{"".join(parts)}' if parts else ""


def _test_scores(study: dict[str, Any]) -> str:
    """Return the scores of base, defaults and best on the test rows, which nothing else has read."""
    scores = {system: score for system, score in (study["test"] or {}).items() if score is not None}
    if not scores:
        return ""
    columns: dict[str, dict[str, str]] = {}  # cells by head and system
    for system, score in scores.items():
        for key, value in (score if isinstance(score, dict) else {study["objective"]: score}).items():
            if text := _score_text(key, value):
                columns.setdefault(METRIC_NAMES.get(str(key), str(key)), {})[system] = text
    rows = [([system, *(cells.get(system, "") for cells in columns.values())], system == "best") for system in scores]
    return (
        f'<h2 id="test">On the test rows</h2>\n{scrolling_table("test", ["", *columns], rows)}'
        '<p class="soft">Nothing has read these rows before the end of the search.</p>\n'
    )


def _score_text(key: str, value: Any) -> str:
    """Return a number, or a score with its interval, as text; "" for anything else."""
    score = value if isinstance(value, dict) else {"score": value}
    number = score.get("score")
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return ""
    return format_score(score, "low" in score and "high" in score, ".1f" if key in METRIC_NAMES else ".4f")
