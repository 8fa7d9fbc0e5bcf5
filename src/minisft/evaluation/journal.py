"""What has been computed for one model, written as it comes: a killed evaluation goes on where it stopped."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minisft.evaluation.generation import Generated
from minisft.files import write_atomically


class Journal:
    """A file of JSON lines: the key first, then the loss, and the answers of each batch.

    Lines under another key (other weights, prompts or settings) are of no use and go; a torn last line goes too.

    Args:
        path: `<output>/evaluation/NAME/journal.jsonl`.
        key: what the answers depend on, hashed.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.loss: float | None = None
        self.has_loss = False
        self.seconds = 0.0
        self.answers: dict[int, Generated] = {}
        lines = _whole_lines(path)
        if not lines or lines[0] != {"key": key}:
            lines = [{"key": key}]
        for line in lines[1:]:
            self._take(line)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))

    def add_loss(self, loss: float | None, seconds: float) -> None:
        self._append({"loss": loss, "seconds": seconds})

    def add_answers(self, indices: list[int], answers: list[Generated], seconds: float) -> None:
        given = [[index, asdict(answer)] for index, answer in zip(indices, answers, strict=True)]
        self._append({"answers": given, "seconds": seconds})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        self.seconds += line["seconds"]
        if "loss" in line:
            self.loss, self.has_loss = line["loss"], True
        for index, answer in line.get("answers", []):
            self.answers[index] = Generated(**answer)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # torn when the process was killed
            break
    return lines
