"""How far a run has come: the newest lines of its metrics.jsonl, read while another process may be writing them."""

import json
import math
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import is_lock_held
from minisft.recipe import Recipe
from minisft.run_folder import RunFolder

_END_BYTES = 256 << 10  # of a metrics.jsonl, for its newest lines
_NUMBERS = ("loss", "epoch", "supervised_tokens", "seconds", "peak_memory_mb")


class MetricLines:
    """The lines of a metrics.jsonl; damaged and incomplete ones are left out.

    Args:
        path: Path of the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0  # of the first byte that was not read
        self._inode: int | None = None

    def read_new(self) -> tuple[bool, list[dict[str, Any]]]:
        """Return the lines since the last call, and whether they are all lines of another file of this name.

        `--force` and `--resume` replace the file.

        Raises:
            OSError: The file cannot be read.
            UserError: It is not a regular file.
        """
        if not self._exists():
            return False, []
        stat = self.path.stat()
        replaced = self._inode is not None and (stat.st_ino != self._inode or stat.st_size < self._position)
        if self._inode is None or replaced:
            self._inode, self._position = stat.st_ino, 0
        with self.path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        complete = content.rfind(b"\n") + 1
        self._position += complete
        return replaced, _parse(content[:complete])

    def read_end(self) -> list[dict[str, Any]]:
        """Return the newest lines, as many as there are in the last 256 KiB.

        Raises:
            OSError: The file cannot be read.
            UserError: It is not a regular file.
        """
        if not self._exists():
            return []
        with self.path.open("rb") as file:
            start = max(0, self.path.stat().st_size - _END_BYTES)
            file.seek(start)
            content = file.read(_END_BYTES)
        return _parse(content if start == 0 else content.partition(b"\n")[2])

    def _exists(self) -> bool:
        """Return whether the file exists.

        Raises:
            UserError: Its name leads to something else, such as a pipe, which would be waited for.
        """
        if self.path.exists() and not self.path.is_file():
            raise UserError(self.path, "this is not a regular file", "remove it")
        return self.path.exists()


def _parse(content: bytes) -> list[dict[str, Any]]:
    lines = []
    for raw in content.split(b"\n"):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(line, dict)
            and _is_count(line.get("step"))
            and all(_is_number(line.get(key)) for key in _NUMBERS)
        ):
            lines.append(line)
    return lines


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_at_work(run: RunFolder) -> bool:
    """Return whether a process of this machine, or of one whose locks can be seen here, is at work in a run folder.

    Raises:
        UserError: Something else has the name of the lock file.
    """
    try:
        return is_lock_held(run.root / ".lock")
    except OSError:  # the file system has no locks, or this user may not read the file
        return False


def number_of_steps(recipe: Recipe, line: dict[str, Any]) -> int | None:
    """Return the number of the last step of a run, from its recipe and a line of its metrics; None if unknown.

    The epoch of a line is its step divided by the steps of an epoch.
    """
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    if not line or not line["step"] or not 0 < line["epoch"] < math.inf:
        return None
    return math.ceil(recipe.training.epochs * round(line["step"] / line["epoch"]))
