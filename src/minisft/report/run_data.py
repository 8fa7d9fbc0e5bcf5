"""What the report knows of a run, read from its folder, and the data that the page's scripts draw."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import read_json, read_json_lines
from minisft.metric_names import METRIC_NAMES, metric_title
from minisft.results import best_label, is_reliable, read_results, score_keys
from minisft.run_folder import RunFolder, read_metrics

CURVE_POINTS = 1500  # about as many points of a curve are on a page; longer curves are thinned
EXAMPLE_BYTES = 1_500_000  # limit of the example text on the page; outputs.jsonl holds all of it
CHOSEN_ROWS = 5  # number of the worst rows of a model on the page, of the most improved and of the most worsened ones


@dataclass(frozen=True)
class RunFiles:
    """The content of the files of a run folder.

    Args:
        root: The run folder.
        steps: The lines of metrics.jsonl.
        results: The content of evaluation/results.json, or None.
        ledger: The content of dataset/ledger.json, or None.
        recipe: The text of recipe.yaml, or "".
        preview: The rows of dataset/preview.json.
        environment: The content of environment.json, or None.
    """

    root: Path
    steps: list[dict[str, Any]]
    results: dict[str, Any] | None
    ledger: dict[str, Any] | None
    recipe: str
    preview: list[dict[str, Any]]
    environment: dict[str, Any] | None

    @property
    def systems(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, entry of results.json) of the base model and of every scored checkpoint."""
        if self.results is None:
            return []
        checkpoints = [(entry["checkpoint"], entry) for entry in self.results["checkpoints"]]
        return [("base", self.results["base"]), *checkpoints]

    @property
    def best(self) -> dict[str, Any] | None:
        """The entry of the best checkpoint; None if no checkpoint is scored."""
        return next((entry for name, entry in self.systems if self.results and name == self.results["best"]), None)

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(step, held-out loss) of every scored model; the losses logged during training if none is scored yet."""
        scored = [(entry["step"], entry["loss"]) for _, entry in self.systems if entry.get("loss") is not None]
        return scored or [(line["step"], line["eval_loss"]) for line in self.steps if line.get("eval_loss") is not None]


def read_run(root: Path) -> RunFiles:
    """Read the files of a run folder, of which some may be missing.

    Raises:
        UserError: The folder is not a run folder, or a file in it is damaged.
    """
    recipe = root / "recipe.yaml"
    if not recipe.is_file() and not (root / "metrics.jsonl").is_file():
        problem = "this is not a run folder (it has neither recipe.yaml nor metrics.jsonl)"
        raise UserError(root, problem, "give the `output` of a run")
    prepare_again = f"delete {root / 'dataset'} and run `minisft inspect {root}`, which prepares the data again"
    do_without = "delete it: the page is written without it"
    preview = _read_optional_json(root / "dataset" / "preview.json", do_without, rows=list)
    return RunFiles(
        root=root,
        steps=read_metrics(RunFolder(root)),
        results=read_results(root),
        ledger=_read_optional_json(root / "dataset" / "ledger.json", prepare_again, rows=dict),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        preview=preview["rows"] if preview else [],
        environment=_read_optional_json(root / "environment.json", do_without),
    )


def _read_optional_json(path: Path, fix: str, **fields: type) -> dict[str, Any] | None:
    return read_json(path, fix, **fields) if path.is_file() else None


def metrics_of(run: RunFiles) -> list[str]:
    """Return the keys of the metrics that the run was scored with."""
    return [] if run.results is None else score_keys(run.results["base"])


def figure_id(metric: str) -> str:
    """Return the id of a metric's figure on the page; other elements have ids that a metric's key may equal."""
    return metric if metric in METRIC_NAMES else f"score-{metric}"


def read_answers(run: RunFiles, system: str, name: str) -> list[dict[str, Any]]:
    """Read `evaluation/SYSTEM/NAME`, a line for each answer; [] if the file does not exist.

    Raises:
        UserError: The file is damaged.
    """
    fix = f"run `minisft evaluate {run.root}`, which writes it again: no answer is computed twice"
    return read_json_lines(run.root / "evaluation" / system / name, fix, id=str, prompt=str, output=str)


def page_data(run: RunFiles) -> dict[str, Any]:
    """Return the data of the page's scripts: curves, scores and examples."""
    # 1. The training loss, thinned to about CURVE_POINTS steps.
    losses = [(line["step"], line["loss"]) for line in run.steps if line.get("loss") is not None]
    stride = max(1, len(losses) // CURVE_POINTS)

    # 2. Scores by metric: [step, score, low, high] of every model, without an interval if the scores are unreliable.
    scores: dict[str, Any] | None = None
    if run.results is not None:
        keys = ("score", "low", "high") if is_reliable(run.results) else ("score",)
        constant = run.results["constant"]
        scores = {
            metric: {
                "points": [
                    [entry["step"], *(rounded(entry[metric][key]) for key in keys)]
                    for _, entry in run.systems
                    if metric in entry
                ],
                "constant": rounded(constant[metric]["score"]) if metric in constant else None,
                "title": metric_title(metric),
                "figure": figure_id(metric),
                "lower": metric in run.results.get("lower_is_better", ()),  # whether a lower score is better
            }
            for metric in metrics_of(run)
        }

    # 3. Examples: the user's own prompts come first, if every system has answered the same ones.
    prompts = [read_answers(run, name, "prompts.jsonl") for name, _ in run.systems]
    same_prompts = all([row["id"] for row in rows] == [row["id"] for row in prompts[0]] for rows in prompts)
    examples = [
        _example(list(rows), f"your {rows[0]['id']}", [])
        for rows in (zip(*prompts, strict=True) if same_prompts else ())
    ]
    examples += _held_out_examples(run)

    return {
        "train": [[step, rounded(loss)] for step, loss in losses[::stride]],
        "test": [[step, rounded(loss)] for step, loss in run.held_out],
        "sources": _source_curves(run),
        "scores": scores,
        "systems": [name for name, _ in run.systems],
        "best": run.results["best"] if run.results else None,
        "bestLabel": best_label(run.results) if run.results else None,
        "answerMetric": answer_metric(metrics_of(run)),
        "examples": examples,
    }


def _source_curves(run: RunFiles) -> list[dict[str, Any]]:
    """Return a curve for each source of the training data, (step, mean loss); [] for a run with one source."""
    names = list(dict.fromkeys(name for line in run.steps for name in line.get("sources") or {}))
    short = [Path(name).name for name in names]
    is_clear = len(set(short)) == len(short)
    curves = []
    for place, name in enumerate(names if len(names) > 1 else ()):
        steps = [(line["step"], (line.get("sources") or {}).get(name)) for line in run.steps]
        points = [
            [step, rounded(one["loss_sum"] / one["supervised_tokens"])]
            for step, one in steps
            if one and one["supervised_tokens"]
        ]
        counted = [one for _, one in steps if one and one["supervised_tokens"]]
        tenth = -(-len(counted) // 10)  # steps; the loss of one step alone depends on its few rows of a source
        curves.append(
            {
                "name": name,
                "short": short[place] if is_clear else name,
                "points": points[:: max(1, len(points) // CURVE_POINTS)],
                "tokens": sum(one["supervised_tokens"] for one in counted),
                "first": _mean_loss(counted[:tenth]),
                "last": _mean_loss(counted[-tenth:]),
            }
        )
    return curves


def _mean_loss(steps: list[dict[str, Any]]) -> float | None:
    """Return the mean over the supervised tokens of these steps; None if there are none."""
    tokens = sum(one["supervised_tokens"] for one in steps)
    return rounded(sum(one["loss_sum"] for one in steps) / tokens) if tokens else None


def answer_metric(metrics: list[str]) -> str | None:
    """Return the metric by which single answers are ordered: chrF if it is there, since BLEU needs a corpus."""
    return "chrf" if "chrf" in metrics else next(iter(metrics), None)


def rounded(value: float) -> float:
    """Return a number with five significant digits: enough for a curve, and short in the page's data."""
    return float(f"{value:.5g}")


def _held_out_examples(run: RunFiles) -> list[dict[str, Any]]:
    """Return held-out rows with the answers of all systems, as many as EXAMPLE_BYTES allow.

    In this order: the worst answers of the best checkpoint, those that worsened and improved most against the base
    model, the worst answers of every other system by every metric, and the other rows in a random order.
    """
    names = [name for name, _ in run.systems]
    answers = [read_answers(run, name, "outputs.jsonl") for name in names]
    if not answers or not all(len(rows) == len(answers[0]) for rows in answers):
        return []
    metrics = [
        metric
        for metric in metrics_of(run)
        if all(isinstance(row.get(metric), (int, float)) for rows in answers for row in rows)
    ]

    # 1. The rows by their number in the file; a dict keeps the first place of each.
    numbers: dict[int, None] = {}
    best = run.results["best"] if run.results else None
    lower = (run.results or {}).get("lower_is_better", ())

    def goodness(rows: list[dict[str, Any]], metric: str) -> list[float]:
        """Return the scores of a system's answers, negated where a lower one is better."""
        return [-row[metric] if metric in lower else row[metric] for row in rows]

    if (metric := answer_metric(metrics)) is not None and best in names:
        tuned = goodness(answers[names.index(best)], metric)
        gains = [after - before for before, after in zip(goodness(answers[0], metric), tuned, strict=True)]
        numbers |= dict.fromkeys(_lowest(tuned))
        numbers |= dict.fromkeys(number for number in _lowest(gains) if gains[number] < 0)
        numbers |= dict.fromkeys(number for number in _lowest([-gain for gain in gains]) if gains[number] > 0)
    for rows in answers:
        for metric in metrics:
            numbers |= dict.fromkeys(_lowest(goodness(rows, metric)))
    others = [number for number in range(len(answers[0])) if number not in numbers]
    random.Random(0).shuffle(others)

    # 2. Until the page is full.
    examples, size = [], 0
    for number in [*numbers, *others]:
        rows = [system_answers[number] for system_answers in answers]
        example = _example(rows, f"{rows[0]['id']}, answer {rows[0]['turn']}", metrics) | {"number": number}
        size += len(json.dumps(example, ensure_ascii=False).encode())
        if size > EXAMPLE_BYTES:
            break
        examples.append(example)
    return examples


def _lowest(values: list[float]) -> list[int]:
    """Return the places of the CHOSEN_ROWS lowest values, the lowest first."""
    return sorted(range(len(values)), key=lambda place: values[place])[:CHOSEN_ROWS]


def _example(answers: list[dict[str, Any]], title: str, metrics: list[str]) -> dict[str, Any]:
    """Return one prompt with the answers of all systems and their scores; each distinct text is stored once."""
    written = [_with_reasoning(answer) for answer in answers]
    texts = list(dict.fromkeys(written))  # many checkpoints give the same answer
    indices = {text: index for index, text in enumerate(texts)}
    return {
        "title": title,
        "prompt": answers[0]["prompt"],
        "reference": answers[0].get("reference"),
        "texts": texts,
        "outputs": [indices[text] for text in written],
        "scores": {metric: [rounded(answer[metric]) for answer in answers] for metric in metrics},
    }


def _with_reasoning(answer: dict[str, Any]) -> str:
    """Return an answer with its reasoning, which is not scored, before it."""
    if not answer.get("reasoning"):
        return str(answer["output"])
    return f"[reasoning]\n{answer['reasoning']}\n\n[answer]\n{answer['output']}"
