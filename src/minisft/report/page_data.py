"""What the scripts of a run's page draw and search: curves, scores and answers, no more than a page can hold."""

import json
from collections.abc import Iterable
from typing import Any

from minisft.claims import best_label, is_reliable
from minisft.report.html import rounded
from minisft.report.run_files import METRIC_NAMES, RunFiles, metrics_of, read_answers

CURVE_POINTS = 1500
EXAMPLE_BYTES = 1_500_000  # of example text on the page; all of it lies in outputs.jsonl
CHANGED = 5  # most improved rows on the page, and as many most worsened


def page_data(run: RunFiles) -> dict[str, Any]:
    """The content of the page's data element."""
    losses = [(line["step"], line["loss"]) for line in run.steps if line.get("loss") is not None]
    stride = max(1, len(losses) // CURVE_POINTS)
    return {
        "train": [[step, rounded(loss)] for step, loss in losses[::stride]],
        "test": [[step, rounded(loss)] for step, loss in run.held_out],
        "scores": _score_points(run),
        "systems": [name for name, _ in run.systems],
        "best": run.results["best"] if run.results else None,
        "bestLabel": best_label(run.results) if run.results else None,
        "scoreName": "chrF" if "chrf" in metrics_of(run) else "BLEU",
        "examples": [*_prompt_rows(run), *_example_rows(run)],
    }


def _score_points(run: RunFiles) -> dict[str, Any] | None:
    """(step, score, low, high) of every model; without low and high where they would claim too much."""
    if run.results is None:
        return None
    keys = ("score", "low", "high") if is_reliable(run.results) else ("score",)
    points = {}
    for metric in metrics_of(run):
        scores = [(entry["step"], entry[metric]) for _, entry in run.systems]
        points[metric] = {
            "points": [[step, *(rounded(s[key]) for key in keys)] for step, s in scores],
            "constant": rounded(run.results["constant"][metric]["score"]),
        }
    return points


def _example_rows(run: RunFiles) -> list[dict[str, Any]]:
    """Rows with the answer of every system: the first, the most changed, then as many as there is room for."""
    lines = [read_answers(run, name, "outputs.jsonl") for name, _ in run.systems]
    if not lines or not all(len(rows) == len(lines[0]) for rows in lines):
        return []
    metric = "chrf" if "chrf" in metrics_of(run) else "bleu"
    examples, spent = [], 0
    for place, title in _order(run, lines, metric):
        rows = [system[place] for system in lines]
        example = _side_by_side(rows, f"{rows[0]['id']}, answer {rows[0]['turn']}{title}", metric)
        spent += len(json.dumps(example, ensure_ascii=False).encode())
        if spent > EXAMPLE_BYTES:
            break
        examples.append(example)
    return examples


def _prompt_rows(run: RunFiles) -> list[dict[str, Any]]:
    """The user's own prompts, where every system has answered the same ones."""
    lines = [read_answers(run, name, "prompts.jsonl") for name, _ in run.systems]
    if not lines or not all([row["id"] for row in rows] == [row["id"] for row in lines[0]] for rows in lines):
        return []
    return [_side_by_side(list(rows), f"your {rows[0]['id']}", None) for rows in zip(*lines, strict=True)]


def _side_by_side(rows: list[dict[str, Any]], title: str, metric: str | None) -> dict[str, Any]:
    """One question with the answer of every system."""
    texts = list(dict.fromkeys(row["output"] for row in rows))  # many checkpoints give the same answer
    place = {text: number for number, text in enumerate(texts)}
    return {
        "title": title,
        "prompt": rows[0]["prompt"],
        "reference": rows[0].get("reference"),
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
                    titles[row] = f" ({word}: {gains[row]:+.1f} {METRIC_NAMES[metric]})"
    yield from titles.items()
    yield from ((row, "") for row in range(len(lines[0])) if row not in titles)
