"""The page of a search: one file that opens offline, from `search.json` and the metric logs of the trials."""

import json
import math
import re
import shlex
from html import escape
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_json, write_atomically
from minisft.metric_names import METRIC_NAMES
from minisft.report.comparison import curves_section
from minisft.report.html import environment, scrolling_table, whole_page
from minisft.report.tables import format_score
from minisft.report.verdict import SAME_SPEED
from minisft.results import MIN_CONVERSATIONS
from minisft.run_folder import RunFolder, read_metrics
from minisft.search.charts import Mark, bar_chart, in_drawing_order, parallel_chart, slice_chart, style, text_of
from minisft.search.objective import objective_text
from minisft.search.statistics import cheapest

_STATES = {
    "complete": "ran to the end",
    "pruned": "stopped early",
    "running": "not at their end yet",
    "failed": "failed",
}
_KINDS = {  # the legend of all charts, in the order in which it is read
    "best": "the best trial",
    "tied": "cannot be told apart from it",
    "worse": "worse",
    "stopped": "trained for fewer steps, so pale",
}
_NOTES = """<p class="soft">Trials are compared row by row on the same held-out rows (paired bootstrap), so two trials
may differ although their intervals overlap. With a probability of 95 %, no trial that is as good as the best one is
called worse. A trial that was stopped early is compared with the best one at its last rung, and has the {objective} of
that rung.</p>
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
    best = trials[study["best"]["number"]]
    tied = sorted(number for number in study["indistinguishable"] if number in trials)
    settings = settings_text(best["settings"])
    objective = f"{_objective_name(study)} {objective_text(best, study['objective'])}"
    sentences = [f"Trial {best['number']} is best, with {settings}: {objective}."]
    if len(tied) == 1:
        sentences.append(f"Trial {tied[0]} cannot be told apart from it.")
    elif tied:
        sentences.append(f"{len(tied)} trials cannot be told apart from it: {', '.join(map(str, tied))}.")
    elif sum(trial.get("objective") is not None for trial in trials.values()) > 1:
        sentences.append("Every other trial that was scored is worse than it by more than chance.")
    sentences += [*_cost_sentences(best, [trials[number] for number in tied]), overview]
    rows = study.get("validation_rows")
    if rows is not None and rows < MIN_CONVERSATIONS:
        sentences.append(f"Only {rows} rows were held out: fewer than {MIN_CONVERSATIONS} do not support an interval.")
    return sentences


def _cost_sentences(best: dict[str, Any], tied: list[dict[str, Any]]) -> list[str]:
    """Return a sentence on the cheapest of the settings that cannot be told apart; none if their costs are unknown."""
    seconds = {trial["number"]: _seconds_of_run(trial) for trial in (best, *tied)}
    known = {number: cost for number, cost in seconds.items() if cost is not None}
    if not tied or len(known) < len(seconds):
        return []
    chosen = cheapest(list(seconds), known)
    share = known[chosen] / known[best["number"]]
    if share >= 1 - SAME_SPEED:
        return ["None of these is cheaper than the best one."]
    settings = next(settings_text(trial["settings"]) for trial in tied if trial["number"] == chosen)
    return [f"Of these, trial {chosen} is the cheapest, with {settings}: a whole run takes {share:.0%} of the time."]


def settings_text(settings: dict[str, Any]) -> str:
    """Return a trial's settings as `key=value, ...`, or "the recipe as it is" if it changes none."""
    return ", ".join(f"{key}={text_of(value)}" for key, value in settings.items()) or "the recipe as it is"


def _seconds_of_run(trial: dict[str, Any]) -> float | None:
    """Return what a trial takes when trained to its end, from its seconds up to the last rung; None if unknown."""
    rungs, seconds = trial.get("rungs"), trial.get("seconds")
    return seconds / rungs[-1]["fraction"] if rungs and seconds else None


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
        title += f": {objective_text(trial, study['objective'])}"
    return Mark(title, trial["settings"], objective, trial.get("low"), trial.get("high"), kind)


def _body(output: Path, study: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the sections of the page as HTML, and the data of the script that draws its curves."""
    marks = [_mark(trial, study) for trial in study["trials"]]
    legend = ", ".join(
        f'<span class="{_key_class(kind)}">{text}</span>'
        for kind, text in _KINDS.items()
        if any(mark.kind == kind for mark in marks)
    )
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in search_verdict(study))
    curves, data = _curves(output, study, marks, legend)
    parts = [
        f'<div class="verdict">{sentences}</div>\n',
        _failures(output, study["trials"]),
        _test_scores(study),
        _charts(study, marks, legend),
        curves,
        _recipes(output, study),
        _trials(study, marks),
        f'<p class="soft">This page was written with {escape(environment())}.</p>\n',
    ]
    return "".join(parts), data


def _failures(output: Path, trials: list[dict[str, Any]]) -> str:
    """Return the settings and the errors of the trials that failed."""
    parts = []
    for trial in trials:
        if trial["state"] == "failed":
            settings = escape(settings_text(trial["settings"]))
            parts.append(f'<p class="bad">Trial {trial["number"]} failed, the others continued: {settings}</p>\n')
            if trial.get("error"):
                parts.append(f'<pre tabindex="0">{escape(_relative_paths(str(trial["error"]), output))}</pre>\n')
    return "".join(parts)


def _charts(study: dict[str, Any], marks: list[Mark], legend: str) -> str:
    """Return a slice for each varied key, how much each key matters, and a line through all keys for each trial."""
    name, keys, parts = _objective_name(study), _keys(study), []
    better = "higher" if study.get("higher_is_better") else "lower"
    figures = "".join(
        f"<figure>{chart}<figcaption>{escape(f'{_capital(name)} by {key}')}, 95 % intervals; {better} is better."
        "</figcaption></figure>\n"
        for key in keys
        if (chart := slice_chart(key, marks, name))
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
    return "".join(parts)


def _curves(output: Path, study: dict[str, Any], marks: list[Mark], legend: str) -> tuple[str, dict[str, Any]]:
    """Return the curves of all trials, and their data: those of the best trial last, so that nothing covers them."""
    steps: dict[str, list[dict[str, Any]]] = {}
    styles, rungs = [], []
    trials = {id(mark): trial for mark, trial in zip(marks, study["trials"], strict=True)}
    for mark in in_drawing_order(marks):
        trial = trials[id(mark)]
        name = f"trial {trial['number']}"
        if trial.get("run") and (lines := read_metrics(RunFolder(output / str(trial["run"])))):
            steps[name] = lines
            styles.append(style(mark.kind))
        if points := _rung_points(trial):
            rungs.append({"name": name, "points": points, "color": style(mark.kind), "dots": True})
    section, data = curves_section(steps, styles, legend)
    if rungs:
        caption = f"{escape(_capital(_objective_name(study)))} at the rungs, 95 % intervals: {legend}."
        section += f'<figure id="rungs"><figcaption>{caption}</figcaption></figure>\n'
    return section, {**data, "rungs": rungs}


def _trials(study: dict[str, Any], marks: list[Mark]) -> str:
    """Return the table of all trials."""
    name, keys, rows = _objective_name(study), _keys(study), []
    for trial, mark in zip(study["trials"], marks, strict=True):
        state = {"best": "best", "tied": "cannot be told apart"}.get(mark.kind, trial["state"])
        steps = trial.get("steps")
        settings = [text_of(trial["settings"][key]) if key in trial["settings"] else "" for key in keys]
        cells = [
            state,
            "" if steps is None else f"{steps:,}",
            objective_text(trial, study["objective"]),
            str(trial.get("run") or ""),
        ]
        rows.append(([str(trial["number"]), *settings, *cells], mark.kind == "best"))
    table = scrolling_table("trials", ["trial", *keys, "state", "steps", name, "run"], rows)
    return (
        f'<h2 id="trials">Trials</h2>\n{table}{_NOTES.format(objective=escape(name))}'
        '<p class="soft">Each is a run folder, which evaluate, chat, report and export accept.</p>\n'
    )


def _keys(study: dict[str, Any]) -> list[str]:
    """Return the varied keys in the order in which the trials name them."""
    return list(dict.fromkeys(key for trial in study["trials"] for key in trial["settings"]))


def _capital(text: str) -> str:
    """Return a text as the beginning of a sentence; names such as chrF keep their case."""
    return text if any(map(str.isupper, text)) else text[:1].upper() + text[1:]


def _rung_points(trial: dict[str, Any]) -> list[list[float]]:
    """Return step, objective and interval of a trial at each of its rungs."""
    return [[rung[key] for key in ("step", "objective", "low", "high")] for rung in trial.get("rungs") or []]


def _key_class(kind: str) -> str:
    """Return the class of page.css that gives text the colour of a kind of trial."""
    return style(kind).split()[0].replace("c", "key")


def _recipes(output: Path, study: dict[str, Any]) -> str:
    """Return the best settings as words of a command, and the recipes of the best trial, which open when clicked."""
    if study["best"] is None:
        return ""
    settings = " ".join(_override(key, value) for key, value in study["best"].get("settings", {}).items())
    parts = [f"<p>In any command, after the recipe: <code>{escape(settings)}</code></p>\n"] if settings else []
    for key, title in (
        ("recipe", "reproduces the best trial"),
        ("recipe_all_data", "trains on all rows: a second run"),
    ):
        path = study["best"].get(key)
        if path and (output / path).is_file():
            text = _relative_paths((output / path).read_text(encoding="utf-8", errors="replace"), output)
            parts.append(
                f"<details><summary>{escape(str(path))} {title}</summary>"
                f'<pre tabindex="0">{escape(text)}</pre></details>\n'
            )
    return f'<h2 id="recipe">The recipe to use</h2>\n{"".join(parts)}' if parts else ""


def _override(key: str, value: Any) -> str:
    """Return a setting as a word of the command line, quoted for a shell."""
    return shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")


def _relative_paths(text: str, output: Path) -> str:
    """Return a text in which paths inside the search's folder are relative to it."""
    for folder in dict.fromkeys((str(output.resolve()), str(output.absolute()), str(output))):
        if folder != ".":
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}/(?=[\w.])", "", text)
    return text


def _test_scores(study: dict[str, Any]) -> str:
    """Return the scores of base, defaults and best on the test rows, which nothing else has read."""
    scores = {system: score for system, score in (study["test"] or {}).items() if score is not None}
    if not scores:
        return ""
    columns: dict[str, dict[str, str]] = {}  # cells by head and system
    metrics = dict.fromkeys(
        key for score in scores.values() if isinstance(score, dict) for key in score if isinstance(score[key], dict)
    )
    for system, score in scores.items():
        named = score if isinstance(score, dict) else {study["objective"]: score}
        loss = {"score": named.get("loss"), **{key: named[key] for key in ("low", "high") if key in named}}
        for key, value in (("loss", loss), *((key, named.get(key)) for key in metrics)):
            if text := _score_text(key, value):
                columns.setdefault(METRIC_NAMES.get(key, key), {})[system] = text
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
