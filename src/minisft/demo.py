"""What the demo shows at its end: three answers before and after, where everything lies, what to type next."""

import json
from pathlib import Path
from typing import Any

from minisft.console import say

_SHOWN = 3


def show_demo(root: Path) -> None:
    """Print what a demo run in `root` came to."""
    results = json.loads((root / "evaluation" / "results.json").read_text(encoding="utf-8"))
    best = results["best"]
    scores = {entry["checkpoint"]: entry for entry in results["checkpoints"]}
    say("\nHeld-out dialogues, before and after\n", style="bold")
    for before, after in list(zip(_outputs(root, "base"), _outputs(root, best), strict=True))[:_SHOWN]:
        say(before["prompt"].strip())
        say(f"  base:      {_one_line(before['output'])}", style="red")
        say(f"  tuned:     {_one_line(after['output'])}", style="green")
        say(f"  reference: {_one_line(after['reference'])}\n")
    say(
        f"BLEU on held-out answers: base {results['base']['bleu']['score']:.1f}, "
        f"tuned ({best}) {scores[best]['bleu']['score']:.1f}, "
        f"best stock phrase {results['constant']['bleu']['score']:.1f}\n",
        style="bold",
    )
    _say_where(root)


def _say_where(root: Path) -> None:
    for path, meaning in (
        ("model", "the tuned model, for from_pretrained"),
        ("checkpoints", "one for each epoch, likewise"),
        ("dataset/ledger.json", "what became of every row and token"),
        ("metrics.jsonl", "a line for each step"),
        ("evaluation", "scores, all outputs, examples, the loss curve"),
    ):
        say(f"  {root / path!s:<36} {meaning}")
    say("\nNext:")
    say(f"  minisft chat {root}")
    say("  minisft train recipes/demo.yaml data.source=YOUR.jsonl output=outputs/mine")


def _outputs(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / "evaluation" / name / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
