"""Sources as the recipe names them: files, folders, hub data sets, each with its limit and weight."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisft.data.readers import (
    COMPRESSIONS,
    FILE_TYPES,
    Chunk,
    file_type,
    limit_rows,
    parse_list_columns,
    read_files,
    row_chunks,
)
from minisft.errors import UserError
from minisft.files import cache_folder, expand_pattern, expand_user_path, is_pattern, nearest_path
from minisft.recipe import DataRecipe
from minisft.text import first_line
from minisft.yaml_tree import quoted

_SET_NAME = re.compile(r"\w[\w.-]{0,59}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+$")
_HUB_KEYS = ("split", "subset", "revision")
_TIMEOUT = 5.0  # seconds
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SOURCE_KEYS = ("path", *_HUB_KEYS, "weight", "limit")


@dataclass(frozen=True)
class Source:
    """One source as the recipe names it.

    Args:
        path: A file, a folder, a pattern of files such as data/*.jsonl, or a hub id.
        split: Split of a hub data set.
        subset: Subset of a hub data set.
        revision: Branch, tag or commit of a hub data set; None is the newest commit.
        weight: How often each row counts: 0.5 takes a seeded half, 2 takes each row twice.
        limit: The largest number of rows to read; None is no limit.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    weight: float = 1.0
    limit: int | None = None


def parse_sources(source: Any, key: str = "data.source") -> list[Source]:
    """Return the sources of a recipe's `data.source` or `data.test`, those of all test sets one after the other.

    Raises:
        UserError: An entry has an unknown key or a value of a wrong type.
    """
    if key == "data.test" and is_mapping_of_sets(source):
        return [one for name, listed in _named_sets(source).items() for one in parse_sources(listed, f"{key}.{name}")]
    entries = source if isinstance(source, list) else [source]
    if not entries:
        raise UserError(key, "the list of sources is empty", "name at least one file, folder or hub id")
    return [_parse_source(entry, key) for entry in entries]


def is_mapping_of_sets(test: Any) -> bool:
    """Return whether `data.test` is a mapping of names to sources: a mapping with `path` is one source."""
    return isinstance(test, dict) and "path" not in test


def test_set_names(test: Any) -> list[str]:
    """Return the name of the test set of each source that `parse_sources` gives for `data.test`; [] without sets."""
    if not is_mapping_of_sets(test):
        return []
    sets = _named_sets(test)
    return [name for name, listed in sets.items() for _ in (listed if isinstance(listed, list) else [listed])]


def _named_sets(test: dict[str, Any]) -> dict[str, Any]:
    """Return the sources of `data.test` by the name of their set.

    Raises:
        UserError: There is no set, or a name is empty or has characters that tables and keys do not take.
    """
    if not test:
        fix = "name sets, such as {mine: mine.jsonl, other: other.jsonl}"
        raise UserError("data.test", "the mapping of test sets is empty", fix)
    for name in test:
        if not isinstance(name, str) or not _SET_NAME.fullmatch(name):
            fix = "use at most 60 letters, digits, dots, dashes and underscores"
            known = f"; a source has the keys {', '.join(_SOURCE_KEYS)}"
            raise UserError("data.test", f"{quoted(name)} cannot be the name of a test set", fix + known)
        if name in _SOURCE_KEYS:
            problem = f"a mapping with {name!r} and without `path` is neither one source nor test sets"
            raise UserError("data.test", problem, "add `path`, or choose another name for the set")
    return test


def source_names(sources: Sequence[Source]) -> list[str]:
    """Return a name for each source, unlike all others: what the recipe calls it, and its subset, split or number."""
    names: list[str] = []
    rows = cache_folder() / "rows"
    for source in sources:
        path = Path(source.path)
        name = f"rows in memory {path.stem[:8]}" if path.parent == rows else source.path
        details = [text for text in (source.subset, source.split if source.split != "train" else None) if text]
        name = f"{name} ({', '.join(details)})" if details else name
        repeated = sum(other == name or other.startswith(f"{name} #") for other in names)
        names.append(f"{name} #{repeated + 1}" if repeated else name)
    return names


def _parse_source(entry: Any, key: str) -> Source:
    if isinstance(entry, str):
        return Source(entry)
    if not isinstance(entry, dict):
        raise UserError(key, f"{quoted(entry)} is not a source", "give a path, a hub id, or a mapping with `path`")
    unknown = [name for name in entry if name not in _SOURCE_KEYS]
    if unknown or "path" not in entry:
        problem = f"unknown key {quoted(unknown[0])}" if unknown else "a source without `path`"
        raise UserError(key, problem, f"use the keys {', '.join(_SOURCE_KEYS)}")
    for name in {"path", *_HUB_KEYS} & set(entry):
        may_be_null = name in ("subset", "revision")
        if not isinstance(entry[name], str) and not (may_be_null and entry[name] is None):
            raise UserError(f"{key}.{name}", f"{quoted(entry[name])} is not text", "give a text, or leave it out")
    parsed = Source(**entry)
    is_number = isinstance(parsed.weight, int | float) and not isinstance(parsed.weight, bool)
    if not is_number or not 0 < parsed.weight <= 1000:
        problem = f"must be a number above 0 and at most 1000, and is {quoted(parsed.weight)}"
        raise UserError(f"{key}.weight", problem, "give how often each row counts, such as 0.5 or 2")
    is_integer = isinstance(parsed.limit, int) and not isinstance(parsed.limit, bool)
    if parsed.limit is not None and not (is_integer and parsed.limit > 0):
        problem = f"must be a whole number above 0, and is {quoted(parsed.limit)}"
        raise UserError(f"{key}.limit", problem, "give how many rows to read, or leave it out")
    given = [name for name in _HUB_KEYS if entry.get(name) is not None]
    if given and source_files(parsed):  # files have no splits, and such a key would be ignored
        problem = f"{parsed.path} is local, and only data sets of the hub have a {given[0]}"
        raise UserError(f"{key}.{given[0]}", problem, "leave it out; name the files of that split as `path`")
    return parsed


def source_files(source: Source) -> list[tuple[str, Path]]:
    """Return the files of a source with the names that locations use; none for a hub id.

    Raises:
        UserError: There is no such file, or a folder holds no data.
    """
    try:
        path = expand_user_path(source.path)
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if _is_data(file)]
            if not inside:
                raise UserError(path, "this folder holds no data", f"give files of type {', '.join(FILE_TYPES)}")
            return [(file.relative_to(path).as_posix(), file) for file in inside]
        if path.is_file():
            file_type(path)
            return [(path.name, path)]
        exists = path.exists()
        if not exists and not path.is_symlink() and is_pattern(path):
            matches = expand_pattern(path)
            if not matches:
                fix = "give a pattern of existing files, such as data/*.jsonl"
                raise UserError(path, "no file matches this pattern", fix)
            for _, file in matches:
                file_type(file)
            return matches
    except OSError as error:  # a loop of links, a name too long
        reason = getattr(error, "strerror", None) or error
        raise UserError(source.path, f"cannot be opened ({reason})", "give a file or a folder") from None
    if exists or path.is_symlink():
        problem = "is neither a file nor a folder" if exists else "is a link that leads nowhere"
        raise UserError(source.path, problem, "give a file or a folder")
    close = nearest_path(path)
    if _HUB_ID.match(source.path) and not (close and path.suffix.lower() in FILE_TYPES):
        return []
    fix = "give the path of an existing file, or a hub id as org/name"
    raise UserError(source.path, "there is no such file", f"did you mean {close}?" if close else fix)


def require_sources(data: DataRecipe) -> None:
    """Check that the files that a recipe names exist, before anything is deleted or written.

    Raises:
        UserError: A file does not exist, an entry cannot be parsed, or a file is both trained on and held out.
    """
    given = {"data.source": data.source} | ({} if data.test is None else {"data.test": data.test})
    sources = {key: parse_sources(value, key) for key, value in given.items()}
    for source in (*sources["data.source"], *sources.get("data.test", ())):
        source_files(source)
    refuse_shared(sources)


def refuse_shared(sources: Mapping[str, Sequence[Source]]) -> None:
    """Refuse a file or a hub data set that is in `data.source` and in `data.test`, by whatever name.

    Args:
        sources: The sources of "data.source", and of "data.test" where it is given.

    Raises:
        UserError: There is one; the message names it.
    """
    train = {identity: name for source in sources["data.source"] for identity, name in _identities(source)}
    for source in sources.get("data.test", ()):
        for identity, name in _identities(source):
            if identity in train:
                other_name = "" if train[identity] == name else f", there called {train[identity]}"
                problem = f"{name} is a training source too (data.source{other_name})"
                raise UserError("data.test", problem, "name files that are not trained on, or use data.test_fraction")


def _identities(source: Source) -> Iterator[tuple[Any, str]]:
    """Yield a key that identifies each file of a source, whatever links lead to it, and the file's name."""
    files = source_files(source)
    for _, path in files:
        status = path.stat()
        yield (status.st_dev, status.st_ino), str(path)
    if not files:
        yield (source.path, source.split, source.subset, source.revision), source.path


def ignored_files(source: Source) -> list[str]:
    """Return the files in a source's folder that are not read, since their names are not those of data files."""
    folder = expand_user_path(source.path)
    if not folder.is_dir():
        return []
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return [str(path) for path in files if not _is_data(path)]


def _is_data(path: Path) -> bool:
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in COMPRESSIONS]
    try:
        return path.is_file() and bool(suffixes) and suffixes[-1] in FILE_TYPES and not path.name.startswith(".")
    except OSError:
        return False


def read_source(source: Source, index: int, seed: int = 0) -> Iterator[Chunk]:
    """Yield the rows of a source as chunks, with its limit and its weight.

    Args:
        source: The source.
        index: The index of the source, which its chunks carry.
        seed: The seed by which a weight below 1 chooses rows.

    Raises:
        UserError: A file is unreadable, empty, truncated or not what its name says.
    """
    if files := source_files(source):
        chunks = read_files(files, index)
    else:
        chunks = read_hub(source.path, source.split, source.subset, source.revision, index)
    for chunk in limit_rows(chunks, source.limit):
        if source.weight == 1:
            yield chunk
            continue
        # A weight repeats each row; a hash of the row's bytes decides its fraction.
        line_copies = [_copies(line, source.weight, seed) for _, line in chunk.lines]
        row_copies = [_copies(repr(r).encode("utf-8", "surrogatepass"), source.weight, seed) for _, r in chunk.rows]
        yield replace(
            chunk,
            lines=tuple(line for line, n in zip(chunk.lines, line_copies, strict=True) for _ in range(n)),
            rows=tuple(row for row, n in zip(chunk.rows, row_copies, strict=True) for _ in range(n)),
            left_out=line_copies.count(0) + row_copies.count(0),
        )


def _copies(row: bytes, weight: float, seed: int) -> int:
    """Return how often a row counts: the integer part of the weight, plus 1 for a seeded share of the rows."""
    digest = hashlib.blake2b(row.strip(), digest_size=8, key=str(seed).encode()[:64]).digest()
    chance = int.from_bytes(digest, "little") / 2**64
    return int(weight) + (chance < weight - int(weight))


def at_revision(source: Source, known: str | None, keep: bool) -> Source:
    """Return the source with the revision at which it is read; files have none.

    Args:
        source: The source as the recipe names it.
        known: The revision of an earlier preparation, "" or None for none.
        keep: Whether to keep that revision although the hub may have a newer one.
    """
    if source_files(source):
        return source
    newest = None if keep and known else newest_revision(source.path, source.revision)
    return replace(source, revision=newest or known or source.revision)


def newest_revision(path: str, revision: str | None) -> str | None:
    """Return the commit of a data set's branch or tag (None: the main branch); None where the hub does not answer."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().dataset_info(path, revision=revision, timeout=_TIMEOUT).sha
    except Exception:  # no answer, for whatever reason: reading the data set reports it
        return None


def read_hub(path: str, split: str, subset: str | None, revision: str | None, index: int) -> Iterator[Chunk]:
    """Yield the rows of a hub data set, streamed, as chunks of the source `index`.

    Raises:
        UserError: The hub does not serve the data set.
    """
    import datasets

    try:
        rows = datasets.load_dataset(path, subset, split=split, revision=revision, streaming=True)
        numbered = ((f"{split}:{i}", parse_list_columns(row)) for i, row in enumerate(rows))
        yield from row_chunks(numbered, path, index)
    except Exception as error:  # the hub client raises many kinds; for the user each means the same
        reason = first_line(error)
        raise UserError(
            path,
            f"there is no such file, and the hub does not give a data set of that name ({reason})",
            "check the path, or the hub id, split and subset, and the connection",
        ) from None
