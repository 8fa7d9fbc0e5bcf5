"""Files of rows as chunks, each row with its location, never all in memory at once."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from minisft.errors import UserError

FILE_TYPES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv")
COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 1 << 17
CHUNK_ROWS = 256
DUPLICATE = "\0duplicate key"  # under this key a parsed object names a key that it holds twice
LARGEST_ROW = 1 << 23  # bytes: the longest conversations of published data sets have about a megabyte
_READ = 1 << 20
_LARGEST_ELEMENT = 1 << 28  # characters of one element of a JSON array
# The first bytes of a kind of file, the kind, and what to do where the name of the file does not say so.
_CONTENTS = (
    (re.compile(rb"\x1f\x8b"), "gzip", "rename it to {name}.gz"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd", "rename it to {name}.zst"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "bzip2", "unpack it, or pack it as gzip and name it {name}.gz"),
    (re.compile(rb"\xfd7zXZ\x00"), "xz", "unpack it, or pack it as gzip and name it {name}.gz"),
    (re.compile(rb"PK\x03\x04"), "zip", "unpack it"),
    (re.compile(rb"PAR1[^ -~]"), "Parquet", "rename it to {stem}.parquet"),
    (re.compile(rb"ARROW1\x00"), "Arrow", "rename it to {stem}.arrow"),
)
_CONTENT_OF = {".gz": "gzip", ".zst": "zstd", ".parquet": "Parquet", ".arrow": "Arrow"}
# Columns of a table whose text may spell a list: CSV has no lists, and Parquet files often keep them as JSON text.
_LIST_COLUMNS = ("conversations", "conversation", "messages", "history")
_TURNS_OR_TEXT = ("prompt", "completion")  # a list of turns, or a text that only looks like a list


class CellsError(ValueError):
    """A CSV row has more cells than its header has columns. The error takes the place of the row."""

    def __init__(self, cells: int, columns: int) -> None:
        self.cells, self.columns = cells, columns
        super().__init__(cells, columns)


class RowTooLargeError(ValueError):
    """A row has more than `LARGEST_ROW` bytes, which would take minutes and gigabytes to prepare."""

    def __init__(self) -> None:
        super().__init__(f"it has more than {LARGEST_ROW >> 20} MiB")


@dataclass(frozen=True)
class Chunk:
    """Some rows of a source in order, small enough to send to another process.

    Args:
        source: The index of the source.
        lines: Undecoded JSON lines with their line numbers; a chunk has either lines or rows.
        rows: Parsed rows with their locations (a ValueError in place of a row that could not be parsed).
        name: The beginning of the locations of lines.
        left_out: The number of rows that the source's weight left out.
    """

    source: int
    name: str
    lines: tuple[tuple[int, bytes], ...] = ()
    rows: tuple[tuple[str, Any], ...] = ()
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.lines) + len(self.rows)

    def head(self, count: int) -> "Chunk":
        return replace(self, lines=self.lines[:count], rows=self.rows[:count])

    def parsed(self) -> Iterator[tuple[str, Any]]:
        """Yield (location, row) for every row; the row is a ValueError where it is not JSON."""
        yield from self.rows
        for number, line in self.lines:
            yield f"{self.name}:{number}", parse_json(line)


def limit_rows(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    """Yield chunks until they hold `limit` rows; None is no limit."""
    left = limit
    for chunk in chunks:
        if left is not None:
            chunk = chunk.head(left)
            left -= len(chunk)
        yield chunk
        if left == 0:
            return


def file_type(path: Path) -> str:
    """Return the file's type, one of FILE_TYPES, by its name without the suffix of a compression.

    Raises:
        UserError: The name has none of these types.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in FILE_TYPES:
        raise UserError(
            path, "its type is unknown", f"give a file of type {', '.join(FILE_TYPES)} (or .gz, .zst of it)"
        )
    return suffixes[-1]


def read_files(files: Sequence[tuple[str, Path]], index: int) -> Iterator[Chunk]:
    """Yield the rows of files, (name, path) each, as chunks of the source `index`.

    Raises:
        UserError: A file is unreadable, empty, truncated or not what its name says.
    """
    for name, path in files:
        empty = True
        try:
            for chunk in _read_file(name, path, index):
                empty = False
                yield chunk
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 at byte {error.start} ({error.reason})"
            raise UserError(path, problem, "save the file as UTF-8") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(path, f"the compressed file is damaged ({error})", "download or pack it again") from None
        except OSError as error:
            raise UserError(path, f"cannot be read ({error.strerror or error})", "check the file") from None
        if empty:
            raise UserError(path, "the file holds no rows", "give a file with one conversation or more")


def _read_file(name: str, path: Path, index: int) -> Iterator[Chunk]:
    # 1. Refuse a file whose first bytes show a compression or a table that its name does not name.
    kind, suffix = file_type(path), path.suffix.lower()
    with path.open("rb") as opened:
        start = opened.read(16)
    content, fix = next(((name, fix) for magic, name, fix in _CONTENTS if magic.match(start)), ("", ""))
    if content and content != _CONTENT_OF.get(suffix):
        if kind in (".parquet", ".arrow") and content not in ("Parquet", "Arrow"):
            fix = "unpack it: files of this kind are read unpacked"
        bare = path.name[: -len(suffix)] if suffix in COMPRESSIONS else path.name
        fix = fix.format(name=bare, stem=bare.rpartition(".")[0])
        raise UserError(path, f"its content is {content}, and its name says {path.suffix}", fix)
    # 2. Read it by its type.
    if kind in (".parquet", ".arrow"):
        yield from _read_table(name, path, index, kind)
        return
    with _open(path) as file:
        if kind == ".csv":
            yield from row_chunks(_csv_rows(name, file), name, index)
        elif kind == ".json" and not _is_json_lines(path):
            yield from row_chunks(_json_rows(name, path, file), name, index)
        else:
            yield from _line_chunks(file, path, name, index)


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def row_chunks(rows: Iterable[tuple[str, Any]], name: str, index: int) -> Iterator[Chunk]:
    """Yield (location, row) pairs as chunks of at most CHUNK_ROWS rows."""
    held: list[tuple[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == CHUNK_ROWS:
            yield Chunk(index, name, rows=tuple(held))
            held = []
    if held:
        yield Chunk(index, name, rows=tuple(held))


# --- JSON lines -------------------------------------------------------------------------------------------


def _line_chunks(file: IO[bytes], path: Path, name: str, index: int) -> Iterator[Chunk]:
    """Yield the lines of a file undecoded, in chunks of about CHUNK_BYTES; blank lines are left out."""
    number, ended = 0, False
    while not ended:
        lines: list[tuple[int, bytes]] = []
        size = 0
        while size < CHUNK_BYTES:
            part = file.readline(LARGEST_ROW + 1)
            ended = not part
            if ended:
                break
            size += len(part)
            number += 1
            line = part if number > 1 else _without_bom(part, path)
            if line.strip():
                lines.append((number, line))
            while len(part) > LARGEST_ROW and not part.endswith(b"\n"):  # only the beginning of such a row is kept
                part = file.readline(LARGEST_ROW + 1)
        if lines:
            yield Chunk(index, name, lines=tuple(lines))


def _without_bom(first: bytes, path: Path) -> bytes:
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(path, "the file is UTF-16", "save it as UTF-8")
    return first.removeprefix(codecs.BOM_UTF8)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; DUPLICATE names a key that they hold twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        made[DUPLICATE] = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def parse_json(line: bytes) -> Any:
    """Return the value of one JSON line, or a ValueError (not raised) that names the fault."""
    if len(line) > LARGEST_ROW:
        return RowTooLargeError()
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        return error
    except RecursionError:
        return ValueError("nested too deeply")


# --- JSON -------------------------------------------------------------------------------------------------


def _is_json_lines(path: Path) -> bool:
    """Return whether a .json file holds one object per line: its first line is one object, and another follows."""
    with _open(path) as file:
        first = file.readline(_READ).removeprefix(codecs.BOM_UTF8)
        rest = file.read(4096).strip()
    if not first.lstrip().startswith(b"{") or not rest.startswith(b"{"):
        return False
    return isinstance(parse_json(first), dict)


class _Text:
    """Text of a file, read as far as needed, with the line number of the next character."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.line, self.ended = "", 1, False
        self.taken = 0  # characters of the last value
        self.more(_READ)

    def more(self, size: int) -> None:
        data = self._file.read(size)
        if self.line == 1 and not self.text:
            _without_bom(data, self._path)
        self.ended = len(data) == 0
        self.text += self._decode.decode(data, final=self.ended)

    def drop(self, count: int) -> None:
        self.line += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def skip_space(self) -> str:
        """Drop white space. Return the next character, or "" at the end."""
        while True:
            stripped = self.text.lstrip(" \t\r\n")
            self.drop(len(self.text) - len(stripped))
            if self.text or self.ended:
                return self.text[:1]
            self.more(_READ)

    def error(self, problem: str, offset: int = 0) -> UserError:
        line = self.line + self.text.count("\n", 0, offset)
        return UserError(f"{self._path}:{line}", problem, "fix the file there; a JSON checker shows the position")

    def value(self) -> Any:
        """Return the next JSON value, and drop it from the text.

        Raises:
            UserError: The text is not JSON.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text)
            except json.JSONDecodeError as error:
                far = error.pos < len(self.text) - 65536 and not error.msg.startswith("Unterminated")
                if self.ended or far or len(self.text) > _LARGEST_ELEMENT:
                    raise self.error(f"not JSON: {error.msg}", error.pos) from None
            except ValueError as error:
                raise self.error(f"not JSON: {error}") from None
            except RecursionError:
                raise self.error("this JSON cannot be read: it is nested too deeply") from None
            else:
                if self.ended or end < len(self.text):
                    self.drop(end)
                    self.taken = end
                    return value
            self.more(max(_READ, len(self.text)))


def _json_rows(name: str, path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) of a file that holds a JSON list of rows, or one object."""
    text = _Text(file, path)
    # 1. One object, which may wrap the list of rows.
    opening = text.skip_space()
    if opening == "":
        raise UserError(path, "the file is empty", "give a file with one conversation or more")
    if opening != "[":
        line, value = text.line, text.value()
        for key in ("data", "train", "rows", "examples", "items") if isinstance(value, dict) else ():
            wrapped = value.get(key)
            if isinstance(wrapped, list) and wrapped and all(isinstance(row, dict) for row in wrapped):
                yield from ((f"{name}:{key}[{i}]", row) for i, row in enumerate(wrapped))
                break
        else:
            yield f"{name}:{line}", value
        if text.skip_space():
            raise text.error("not JSON: more text after the end of the value")
        return
    # 2. A list, which is read one element at a time.
    text.drop(1)
    if text.skip_space() == "]":
        return
    number, previous = 0, 0
    while True:
        text.skip_space()
        line = text.line
        place = f"{name}:{line}" if line != previous else f"{name}:{line}#{number}"
        row = text.value()
        yield place, row if text.taken <= LARGEST_ROW else RowTooLargeError()
        number, previous = number + 1, line
        separator = text.skip_space()
        if separator == "]":
            text.drop(1)
            if text.skip_space():
                raise text.error("not JSON: more text after the end of the list")
            return
        if separator != ",":
            raise text.error("not JSON: expected ',' or ']' (is the file cut off?)")
        text.drop(1)


# --- tables -------------------------------------------------------------------------------------------


def _csv_rows(name: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LARGEST_ROW)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(_bounded_lines(name, text), restkey=DUPLICATE)
    try:
        columns = list(reader.fieldnames or ())
        if twice := next((column for column in columns if columns.count(column) > 1), None):
            raise UserError(f"{name}:1", f"the header names the column {twice!r} twice", "give each column one name")
        for row in reader:
            place, extra = f"{name}:{reader.line_num}", row.pop(DUPLICATE, None)
            yield (
                place,
                parse_list_columns(row) if extra is None else CellsError(len(columns) + len(extra), len(columns)),
            )
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}", f"not CSV: {error}", "fix the file there") from None


def _bounded_lines(name: str, text: IO[str]) -> Iterator[str]:
    number = 0
    while line := text.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            raise UserError(f"{name}:{number}", f"{RowTooLargeError()}", "leave the row out, or split it")
        yield line


def parse_list_columns(row: Any) -> Any:
    """Replace conversations and histories that a row of a table spells as JSON text by the lists, in place."""
    if not isinstance(row, dict):
        return row
    for column in (*_LIST_COLUMNS, *_TURNS_OR_TEXT):
        text = row.get(column)
        if not isinstance(text, str) or text.lstrip()[:1] != "[":
            continue
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError):
            continue
        is_turns = isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)
        if is_turns or (isinstance(value, list) and column not in _TURNS_OR_TEXT):
            row[column] = value
    return row


def _read_table(name: str, path: Path, index: int, kind: str) -> Iterator[Chunk]:
    import pyarrow as pa

    start = 0
    try:
        for batch in _table_batches(path, kind):
            rows = [parse_list_columns(row) for row in batch.to_pylist()]
            yield Chunk(index, name, rows=tuple((f"{name}:{start + i}", row) for i, row in enumerate(rows)))
            start += len(rows)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(path, f"not a complete {kind} file ({error})", "write or download it again") from None


def _table_batches(path: Path, kind: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(CHUNK_ROWS)
        return
    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(file)
            reader = (opened.get_batch(i) for i in range(opened.num_record_batches))
        for batch in reader:
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                yield batch.slice(start, CHUNK_ROWS)
