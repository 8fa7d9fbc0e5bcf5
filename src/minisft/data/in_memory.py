"""Rows in memory as a source: written once to a file of the cache folder that is named by the hash of its content.

A recipe names that file, so that resuming, caching, several processes and fingerprints work as for every other file.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.files import cache_folder

_FIX = "give dicts of text, numbers, True, False, None, lists and dicts, as JSON has them"
_MOST_DEPTH = 40


def source_of(data: Any, where: str = "data") -> Any:
    """Return what the recipe's `data.source` says for data that a program gives.

    Args:
        data: Rows (an iterable of dicts, or one split of a `datasets` object), or what a recipe takes: a path, a hub
            id, a mapping, or a list of them.
        where: The argument's name, for messages.

    Raises:
        UserError: There are no rows, or a row cannot be written as JSON; the message names row and key.
    """
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, Mapping) and type(data).__name__ in ("DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, data))
        raise UserError(where, f"these are several splits ({splits})", f'give one, such as {where}["train"]')
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, list | tuple) and data and all(isinstance(item, str | Path) for item in data):
        return [str(item) for item in data]
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        problem = f"a value of the type {type(data).__name__} is not data"
        raise UserError(where, problem, "give rows (a list of dicts or a datasets.Dataset) or a path")
    return str(_write_rows(data, where))


def test_of(test: Any) -> Any:
    """Return what the recipe's `data.test` says for held-out data that a program gives; see `source_of`.

    A dict without `path` gives test sets by name, each of them data as `source_of` takes it.
    """
    if type(test) is dict and "path" not in test:
        return {name: source_of(data, f"test[{name!r}]") for name, data in test.items()}
    return source_of(test, "test")


def _write_rows(rows: Iterable[Any], where: str) -> Path:
    """Write all rows as JSON lines, or nothing; return the path of the file."""
    folder = cache_folder() / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}-{id(rows)}"
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file:
            for number, row in enumerate(rows):
                place = f"{where}[{number}]"
                if not isinstance(row, Mapping):
                    raise UserError(place, f"a row of the type {type(row).__name__} is not a dict", _FIX)
                try:
                    line = json.dumps(_plain(row, place), ensure_ascii=False, allow_nan=False).encode() + b"\n"
                except UnicodeEncodeError:
                    problem = "its text holds half of a surrogate pair, which UTF-8 cannot write"
                    raise UserError(place, problem, _FIX) from None
                digest.update(line)
                size += file.write(line)
        if size == 0:
            raise UserError(where, "there are no rows", "give at least one")
        path = folder / f"{digest.hexdigest()}.jsonl"
        if not path.is_file() or path.stat().st_size != size:
            temporary.replace(path)
        return path
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Return `value` with the types of JSON alone; refuse values that JSON would lose or change."""
    if depth > _MOST_DEPTH:
        raise UserError(where, f"it is nested more than {_MOST_DEPTH} levels deep", _FIX)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UserError(where, f"the key {key!r} is not text", _FIX)
        return {key: _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{number}]", depth + 1) for number, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(where, f"{value} is not a number that JSON has", _FIX)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UserError(where, f"a value of the type {type(value).__name__} cannot be written as JSON", _FIX)
