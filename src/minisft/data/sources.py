"""Sources as the recipe names them: files, folders, data sets of the hub, each with its limit and weight."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisft.data.hub import newest_revision, read_hub
from minisft.data.readers import COMPRESSIONS, FILE_TYPES, Chunk, file_type, read_files
from minisft.errors import UserError
from minisft.recipe import DataRecipe

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+$")
_SOURCE_KEYS = ("path", "split", "subset", "revision", "weight", "limit")


@dataclass(frozen=True)
class Source:
    """One source as the recipe names it.

    Args:
        path: a file, a folder or a hub id.
        split: of a hub data set.
        subset: of a hub data set.
        revision: of a hub data set: a branch, a tag or a commit; None is the newest.
        weight: how often each row counts: 0.5 takes a seeded half, 2 takes each row twice.
        limit: at most so many rows.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    weight: float = 1.0
    limit: int | None = None


def parse_sources(source: Any, key: str = "data.source") -> list[Source]:
    """The sources of a recipe's `data.source` or `data.test`.

    Raises:
        UserError: an entry has an unknown key or a wrong type.
    """
    entries = source if isinstance(source, list) else [source]
    if not entries:
        raise UserError(key, "the list of sources is empty", "name at least one file, folder or hub id")
    return [_parse_source(entry, key) for entry in entries]


def _parse_source(entry: Any, key: str) -> Source:
    if isinstance(entry, str):
        return Source(entry)
    if not isinstance(entry, dict):
        raise UserError(key, f"{entry!r} is no source", "give a path, a hub id, or a mapping with `path`")
    unknown = [name for name in entry if name not in _SOURCE_KEYS]
    if unknown or "path" not in entry:
        what = f"unknown key {unknown[0]!r}" if unknown else "a source without `path`"
        raise UserError(key, what, f"use the keys {', '.join(_SOURCE_KEYS)}")
    parsed = Source(**entry)
    for name in ("path", "split", "subset", "revision"):
        if not isinstance(entry.get(name, ""), str):
            raise UserError(f"{key}.{name}", f"{entry[name]!r} is no text", "give a text, or leave it out")
    if not isinstance(parsed.weight, int | float) or not 0 < parsed.weight <= 1000:
        raise UserError(f"{key}.weight", f"{parsed.weight!r} is no weight", "give a number above 0")
    if parsed.limit is not None and (not isinstance(parsed.limit, int) or parsed.limit < 1):
        raise UserError(f"{key}.limit", f"{parsed.limit!r} is no number of rows", "give a whole number above 0")
    return parsed


def source_files(source: Source) -> list[tuple[str, Path]]:
    """The files of a source with the names that locations use; none for a hub id.

    Raises:
        UserError: there is no such file, or a folder holds no data.
    """
    try:
        path = Path(source.path).expanduser()
        if path.is_dir():
            return _folder_files(path)
        if path.is_file():
            file_type(path)
            return [(path.name, path)]
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long; the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(source.path, f"cannot be opened ({reason})", "give a file or a folder") from None
    if exists or path.is_symlink():
        what = "is neither a file nor a folder" if exists else "is a link that leads nowhere"
        raise UserError(source.path, what, "give a file or a folder")
    if _HUB_ID.match(source.path):
        return []
    raise UserError(source.path, "there is no such file", "give the path of an existing file, or a hub id as org/name")


def require_sources(data: DataRecipe) -> None:
    """Find out whether the files that a recipe names are there, before anything is deleted or written.

    Raises:
        UserError: one is not, or an entry makes no sense.
    """
    for key, given in (("data.source", data.source), ("data.test", data.test)):
        for source in parse_sources(given, key) if given is not None else ():
            source_files(source)


def _folder_files(folder: Path) -> list[tuple[str, Path]]:
    files = [path for path in sorted(folder.rglob("*")) if _is_data(path)]
    if not files:
        raise UserError(folder, "this folder holds no data", f"give files of type {', '.join(FILE_TYPES)}")
    return [(path.relative_to(folder).as_posix(), path) for path in files]


def _is_data(path: Path) -> bool:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    try:
        return path.is_file() and bool(suffixes) and suffixes[-1] in FILE_TYPES and not path.name.startswith(".")
    except OSError:
        return False


def read_source(source: Source, index: int, seed: int = 0) -> Iterator[Chunk]:
    """The rows of a source as chunks, with its limit and its weight.

    Raises:
        UserError: the file is unreadable, empty, truncated or not what its name says.
    """
    left = source.limit
    for chunk in _chunks(source, index):
        if left is not None:
            chunk = chunk.head(left)
            left -= len(chunk)
        yield chunk if source.weight == 1 else _weighted(chunk, source.weight, seed)
        if left == 0:
            return


def _chunks(source: Source, index: int) -> Iterator[Chunk]:
    files = source_files(source)
    if files:
        return read_files(files, index)
    return read_hub(source.path, source.split, source.subset, source.revision, index)


def _weighted(chunk: Chunk, weight: float, seed: int) -> Chunk:
    """Each row as often as the weight says; the share of a fraction is chosen by the row's own bytes."""
    copies = [_copies(line, weight, seed) for _, line in chunk.lines]
    copies += [_copies(repr(row).encode("utf-8", "surrogatepass"), weight, seed) for _, row in chunk.rows]
    lines = [line for line, count in zip(chunk.lines, copies, strict=False) for _ in range(count)]
    rows = [row for row, count in zip(chunk.rows, copies[len(chunk.lines) :], strict=True) for _ in range(count)]
    return replace(chunk, lines=tuple(lines), rows=tuple(rows), left_out=copies.count(0))


def _copies(row: bytes, weight: float, seed: int) -> int:
    digest = hashlib.blake2b(row.strip(), digest_size=8, key=str(seed).encode()[:64]).digest()
    chance = int.from_bytes(digest, "little") / 2**64
    return int(weight) + (chance < weight - int(weight))


def at_revision(source: Source, known: str | None, keep: bool) -> Source:
    """A source with the revision that it is read at; files have none.

    Args:
        source: the source as the recipe names it.
        known: the revision of an earlier preparation, "" or None for none.
        keep: take that one though the hub may have a newer one.
    """
    if source_files(source):
        return source
    newest = None if keep and known else newest_revision(source.path, source.revision)
    return replace(source, revision=newest or known or source.revision)
