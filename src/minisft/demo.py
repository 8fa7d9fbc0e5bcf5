"""The summary at the end of the demo: answers before and after, scores, files, and what to type next."""

import json
from pathlib import Path
from typing import Any

from minisft.console import say
from minisft.metric_names import METRIC_NAMES
from minisft.results import read_results

_SHOWN = 3


def show_demo(root: Path) -> None:
    """Print the results of the demo run in the folder `root`."""
    results = read_results(root)
    assert results is not None, "the evaluation has just written it"
    _say_answers(root, results["best"])
    _say_scores(results)
    _say_where(root)


def _say_answers(root: Path, best: str | None) -> None:
    """Print the first answers of the base model, with those of the best checkpoint if there is one."""
    say(f"\nHeld-out dialogues, {'before and after' if best else 'answered by the base model'}\n", style="bold")
    before = _outputs(root, "base")[:_SHOWN]
    after = _outputs(root, best)[:_SHOWN] if best else [None] * len(before)
    for base, tuned in zip(before, after, strict=True):
        say(base["prompt"].strip())
        say(f"  base:      {_one_line(base['output'])}", style="red")
        if tuned is not None:
            say(f"  tuned:     {_one_line(tuned['output'])}", style="green")
        say(f"  reference: {_one_line(base['reference'])}\n")


def _say_scores(results: dict[str, Any]) -> None:
    best = next((entry for entry in results["checkpoints"] if entry["checkpoint"] == results["best"]), None)
    for metric, name in METRIC_NAMES.items():
        if metric in results["base"]:
            below = ", below base" if best and best[metric]["score"] < results["base"][metric]["score"] else ""
            tuned = f"tuned ({best['checkpoint']}{below}) {best[metric]['score']:.1f}, " if best else ""
            say(
                f"{name} on held-out answers: base {results['base'][metric]['score']:.1f}, {tuned}"
                f"constant baseline {results['constant'][metric]['score']:.1f}",
                style="bold",
            )
    if best is None:
        say("No checkpoint could be scored.", style="bold")
    say()


def _say_where(root: Path) -> None:
    for path, meaning in (
        ("model", "the tuned model, for from_pretrained"),
        ("checkpoints", "one for each epoch, each a plain model folder too"),
        ("dataset/ledger.json", "what became of every row and token"),
        ("metrics.jsonl", "a line for each step"),
        ("evaluation", "scores, all outputs, examples, the loss curve"),
    ):
        say(f"  {root / path!s:<36} {meaning}")
    say("\nNext:")
    say(f"  minisft chat {root}")
    say("  minisft init YOUR.jsonl              a recipe for your own conversations")


def _outputs(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / "evaluation" / name / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
