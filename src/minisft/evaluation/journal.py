"""What has been computed for one model, written as it comes: a killed evaluation goes on where it stopped.

One process writes it. Answers stand under their prompts and the loss under its rows, so that other questions later
(more turns, a limit, prompts of the user's own) leave what is there of use.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minisft.evaluation.generation import Generated
from minisft.files import write_atomically


class Journal:
    """A file of JSON lines: the key first, then losses, and the answers of each batch.

    Lines under another key (other weights or another way of decoding) are of no use and go; a torn last line goes too.

    Args:
        path: `<output>/evaluation/NAME/journal.jsonl`.
        key: what every answer depends on besides its prompt, hashed; None: the weights are gone, whatever
            was computed with them in the way that `how` names holds, and nothing is written.
        how: the same without the weights.
    """

    def __init__(self, path: Path, key: str | None, how: str) -> None:
        self.path = path
        self._losses: dict[str, tuple[float | None, float]] = {}
        self._answers: dict[str, tuple[Generated, float]] = {}
        lines = _whole_lines(path)
        known = lines[0] if lines else {}
        holds = known.get("how") == how if key is None else known.get("key") == key
        lines = lines[1:] if holds else []
        for line in lines:
            self._take(line)
        if key is not None:
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in ({"key": key, "how": how}, *lines)))

    def has_answer(self, prompt: Sequence[int]) -> bool:
        return prompt_key(prompt) in self._answers

    def answer(self, prompt: Sequence[int]) -> Generated:
        return self._answers[prompt_key(prompt)][0]

    def has_loss(self, rows: str) -> bool:
        return rows in self._losses

    def loss(self, rows: str) -> float | None:
        """The loss on the rows with this fingerprint; None where it is no finite number."""
        return self._losses[rows][0]

    def seconds(self, rows: str, prompts: Sequence[Sequence[int]]) -> float:
        """What the loss and these prompts' answers took, added up over processes."""
        keys = {prompt_key(prompt) for prompt in prompts}
        return self._losses[rows][1] + sum(self._answers[key][1] for key in keys)

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
    """What a prompt's answer stands under: a hash of its token ids."""
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()[:24]


def holds_anything(path: Path) -> bool:
    """Whether a journal holds a loss or an answer; of a checkpoint that could not be loaded it holds the key alone."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return len(list(zip(file, range(2), strict=False))) > 1


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first that is torn or damaged: what stood after it is computed again."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for text in path.read_bytes().splitlines():
        line = _read_line(text)
        if line is None:
            break
        lines.append(line)
    return lines


def _read_line(text: bytes) -> dict[str, Any] | None:
    """A line of the journal, None where it is none."""
    try:
        line = json.loads(text)
        if "answers" in line:
            [(str(key), Generated(**answer)) for key, answer in line["answers"]]
            float(line["seconds"])
        elif "rows" in line:
            float(line["seconds"]) + float(line["loss"] or 0)
        elif not {"key", "how"} <= set(line):
            return None
    except (ValueError, TypeError, KeyError):
        return None
    return line if isinstance(line, dict) else None
