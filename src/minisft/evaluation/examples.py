"""Answers as files: all of them as JSON lines, the first ones and the most changed ones to read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisft.evaluation.generation import Generated
from minisft.evaluation.questions import Question
from minisft.evaluation.scoring import CorpusScore
from minisft.files import write_atomically
from minisft.text import json_text, printable

CHANGES = 3  # most improved, and as many most worsened


def write_outputs(
    folder: Path,
    questions: Sequence[Question],
    answers: Sequence[Generated],
    outputs: Sequence[str],
    scores: Mapping[str, CorpusScore],
) -> None:
    """Write `outputs.jsonl`: a line per answer, with its own scores and how it ended."""
    own = {metric: score.rows() for metric, score in scores.items()}
    lines = []
    for place, (question, answer, output) in enumerate(zip(questions, answers, outputs, strict=True)):
        line: dict[str, Any] = {
            "id": question.id,
            "turn": question.turn,
            "prompt": question.prompt,
            "reference": question.reference,
            "output": output,
            "finish": answer.finish,
            "tokens": len(answer.ids),
        }
        line |= {metric: round(rows[place], 4) for metric, rows in own.items()}
        lines.append(_one_line(line) + "\n")
    write_atomically(folder / "outputs.jsonl", "".join(lines))


def write_examples(folder: Path, questions: Sequence[Question], outputs: Sequence[str]) -> None:
    """Write `examples.txt`: the given questions, to read."""
    parts = []
    for number, (question, output) in enumerate(zip(questions, outputs, strict=False), 1):
        heading = f"===== example {number} of {len(questions)}: {question.id}, answer {question.turn} ====="
        sections = {"prompt": question.prompt, "reference": question.reference, "output": output}
        parts.append("\n".join([heading, *(f"--- {name} ---\n{text}" for name, text in sections.items())]))
    write_atomically(folder / "examples.txt", printable("\n\n".join(parts) + "\n"))


def write_prompts(
    folder: Path, prompts: Sequence[Question], answers: Sequence[Generated], outputs: Sequence[str]
) -> None:
    """Write `prompts.jsonl`: a line for each of the user's own prompts, or no such file where there are none."""
    path = folder / "prompts.jsonl"
    if not prompts:
        path.unlink(missing_ok=True)
        return
    lines = [
        {"id": p.id, "prompt": p.prompt, "output": output, "finish": answer.finish, "tokens": len(answer.ids)}
        for p, answer, output in zip(prompts, answers, outputs, strict=True)
    ]
    write_atomically(path, "".join(_one_line(line) + "\n" for line in lines))


def write_side_by_side(folder: Path, prompts: Sequence[Question], outputs: Mapping[str, Sequence[str]]) -> None:
    """Write `prompts.txt`: each of the user's own prompts with every system's answer beneath, to read."""
    path = folder / "prompts.txt"
    if not prompts:
        path.unlink(missing_ok=True)
        return
    parts = []
    for place, prompt in enumerate(prompts):
        heading = f"===== {prompt.id} of {len(prompts)} =====\n--- prompt ---\n{prompt.prompt}"
        parts.append("\n".join([heading, *(f"--- {name} ---\n{given[place]}" for name, given in outputs.items())]))
    write_atomically(path, printable("\n\n".join(parts) + "\n"))


def write_changes(
    folder: Path,
    base: tuple[str, Sequence[str]],
    best: tuple[str, Sequence[str]],
    questions: Sequence[Question],
) -> None:
    """Write `changes.txt`: where the best checkpoint gained most over the base model, and where it lost most."""
    references = [question.reference for question in questions]
    before, after = (CorpusScore("chrf", outputs, references).rows() for _, outputs in (base, best))
    gains = [late - early for early, late in zip(before, after, strict=True)]
    order = sorted(range(len(gains)), key=lambda place: -gains[place])
    improved = [place for place in order[:CHANGES] if gains[place] > 0]
    worsened = [place for place in order[::-1][:CHANGES] if gains[place] < 0]
    parts = [f"{best[0]} against {base[0]}, by the chrF of each answer"]
    for title, places in (("improved", improved), ("worsened", worsened)):
        for place in places:
            question = questions[place]
            heading = (
                f"===== {title}: {before[place]:.1f} to {after[place]:.1f}: {question.id}, answer {question.turn} ====="
            )
            sections = {
                "prompt": question.prompt, "reference": question.reference,
                base[0]: base[1][place], best[0]: best[1][place],
            }  # fmt: skip
            parts.append("\n".join([heading, *(f"--- {name} ---\n{text}" for name, text in sections.items())]))
    write_atomically(folder / "changes.txt", printable("\n\n".join(parts) + "\n"))


def _one_line(fields: dict[str, Any]) -> str:
    """JSON in one line for every reader: some take these two, and U+0085, for line ends."""
    text = json_text(fields)
    for separator in "\u2028\u2029":
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text
