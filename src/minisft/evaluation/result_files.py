"""Files of one scored model: the result cache, outputs.jsonl, and examples to read.

Only one process writes them. The cache keeps answers by prompt and the loss by rows, so that it stays valid when the
examples change later (more turns, a limit, the user's own prompts).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minisft.evaluation.examples import EvalExample
from minisft.evaluation.generation import Generated
from minisft.evaluation.metrics import CorpusScore, Score
from minisft.files import write_atomically
from minisft.text import dump_json, printable


class ResultCache:
    """A file of JSON lines: the key first, then losses, and the answers of each batch.

    Lines under another key (other weights or decoding settings) are deleted; so is an incomplete last line.

    Args:
        path: `<output>/evaluation/NAME/journal.jsonl`.
        key: Hash of everything that an answer depends on besides its prompt. None: the weights were removed; whatever
            was computed with them under the same settings is valid, and nothing is written.
        settings: Hash of the same without the weights.
    """

    def __init__(self, path: Path, key: str | None, settings: str) -> None:
        self.path = path
        self._losses: dict[str, tuple[float | None, float]] = {}
        self._answers: dict[str, tuple[Generated, float]] = {}
        lines = _read_complete_lines(path)
        header = lines[0] if lines else {}
        is_valid = header.get("how") == settings if key is None else header.get("key") == key
        lines = lines[1:] if is_valid else []
        for line in lines:
            self._take(line)
        if key is not None:
            header = {"key": key, "how": settings}
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in (header, *lines)))

    def has_answer(self, prompt: Sequence[int]) -> bool:
        return prompt_key(prompt) in self._answers

    def answer(self, prompt: Sequence[int]) -> Generated:
        return self._answers[prompt_key(prompt)][0]

    def has_loss(self, rows: str) -> bool:
        return rows in self._losses

    def loss(self, rows: str) -> float | None:
        """Return the loss on the rows with this fingerprint; None if it is not a finite number."""
        return self._losses[rows][0]

    def seconds(self, rows: Sequence[str], prompts: Sequence[Sequence[int]]) -> float:
        """Return the seconds that the losses and the answers to these prompts took, summed over processes."""
        keys = {prompt_key(prompt) for prompt in prompts}
        return sum(self._losses[one][1] for one in rows) + sum(self._answers[key][1] for key in keys)

    def add_loss(self, rows: str, loss: float | None, seconds: float) -> None:
        self._append({"rows": rows, "loss": loss, "seconds": seconds})

    def add_answers(self, prompts: Sequence[Sequence[int]], answers: Sequence[Generated], seconds: float) -> None:
        given = [[prompt_key(prompt), asdict(answer)] for prompt, answer in zip(prompts, answers, strict=True)]
        self._append({"answers": given, "seconds": seconds})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            self._losses[line["rows"]] = line["loss"], line["seconds"]
        for key, answer in line.get("answers", []):
            self._answers[key] = Generated(**answer), line["seconds"] / len(line["answers"])


def prompt_key(prompt: Sequence[int]) -> str:
    """Return the key of a prompt's answer: a hash of the prompt's token ids."""
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()[:24]


def has_results(path: Path) -> bool:
    """Return whether a journal holds a loss or an answer; of a checkpoint that did not load it holds only the key."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return len(list(zip(file, range(2), strict=False))) > 1


def _read_complete_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines before the first incomplete or damaged one; whatever follows it is computed again."""
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            if "answers" in line:
                [(str(key), Generated(**answer)) for key, answer in line["answers"]]
                float(line["seconds"])
            elif "rows" in line:
                float(line["seconds"]) + float(line["loss"] or 0)
            elif not {"key", "how"} <= set(line):
                break
        except (ValueError, TypeError, KeyError):
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


CHANGES = 3  # number of most improved answers, and of most worsened ones


def write_outputs(
    folder: Path,
    examples: Sequence[EvalExample],
    answers: Sequence[Generated],
    outputs: Sequence[str],
    reasoning: Sequence[str],
    scores: Mapping[str, Score],
) -> None:
    """Write `outputs.jsonl`: one line per answer, with its own scores and why it ended.

    `output` is the final answer, which is scored; a line of a model that reasons has its `reasoning` too.
    """
    own = {metric: score.rows() for metric, score in scores.items()}
    lines = []
    for place, (example, answer, output) in enumerate(zip(examples, answers, outputs, strict=True)):
        line: dict[str, Any] = {
            "id": example.id,
            "turn": example.turn,
            **({"test_set": example.test_set} if example.test_set else {}),
            "prompt": example.prompt,
            "reference": example.reference,
            "output": output,
            **({"reasoning": reasoning[place]} if reasoning[place] else {}),
            "finish": answer.finish,
            "tokens": len(answer.ids),
        }
        line |= {metric: round(rows[place], 4) for metric, rows in own.items()}
        lines.append(_one_line(line) + "\n")
    write_atomically(folder / "outputs.jsonl", "".join(lines))


def write_examples(
    folder: Path, examples: Sequence[EvalExample], outputs: Sequence[str], reasoning: Sequence[str]
) -> None:
    """Write `examples.txt`: the given examples, for people to read."""
    parts = []
    for number, (example, output, thought) in enumerate(zip(examples, outputs, reasoning, strict=False), 1):
        heading = f"===== example {number} of {len(examples)}: {example.id}, answer {example.turn} ====="
        sections = {"prompt": example.prompt, "reference": example.reference}
        sections |= {"reasoning": thought, "output": output} if thought else {"output": output}
        parts.append("\n".join([heading, *(f"--- {name} ---\n{text}" for name, text in sections.items())]))
    write_atomically(folder / "examples.txt", printable("\n\n".join(parts) + "\n"))


def write_prompts(
    folder: Path,
    prompts: Sequence[EvalExample],
    answers: Sequence[Generated],
    outputs: Sequence[str],
    reasoning: Sequence[str],
) -> None:
    """Write `prompts.jsonl`: one line for each of the user's own prompts; without prompts, delete the file."""
    path = folder / "prompts.jsonl"
    if not prompts:
        path.unlink(missing_ok=True)
        return
    lines = [
        {
            "id": prompt.id,
            "prompt": prompt.prompt,
            "output": output,
            **({"reasoning": thought} if thought else {}),
            "finish": answer.finish,
            "tokens": len(answer.ids),
        }
        for prompt, answer, output, thought in zip(prompts, answers, outputs, reasoning, strict=True)
    ]
    write_atomically(path, "".join(_one_line(line) + "\n" for line in lines))


def write_side_by_side(folder: Path, prompts: Sequence[EvalExample], outputs: Mapping[str, Sequence[str]]) -> None:
    """Write `prompts.txt`: each of the user's own prompts with the answers of all models, for people to read."""
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
    examples: Sequence[EvalExample],
) -> None:
    """Write `changes.txt`: the answers that the best checkpoint improved and worsened most, against the base model."""
    references = [example.reference for example in examples]
    before, after = (CorpusScore("chrf", outputs, references).rows() for _, outputs in (base, best))
    gains = [late - early for early, late in zip(before, after, strict=True)]
    order = sorted(range(len(gains)), key=lambda place: -gains[place])
    improved = [place for place in order[:CHANGES] if gains[place] > 0]
    worsened = [place for place in order[::-1][:CHANGES] if gains[place] < 0]
    parts = [f"{best[0]} against {base[0]}, by the chrF of each answer"]
    for title, places in (("improved", improved), ("worsened", worsened)):
        for place in places:
            example = examples[place]
            heading = (
                f"===== {title}: {before[place]:.1f} to {after[place]:.1f}: {example.id}, answer {example.turn} ====="
            )
            sections = {
                "prompt": example.prompt, "reference": example.reference,
                base[0]: base[1][place], best[0]: best[1][place],
            }  # fmt: skip
            parts.append("\n".join([heading, *(f"--- {name} ---\n{text}" for name, text in sections.items())]))
    write_atomically(folder / "changes.txt", printable("\n\n".join(parts) + "\n"))


def _one_line(fields: dict[str, Any]) -> str:
    """Return JSON that is one line for every reader: some split at U+2028 and U+2029 too."""
    text = dump_json(fields)
    for separator in "\u2028\u2029":
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text
