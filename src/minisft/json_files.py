"""JSON that a run folder holds, read in one place: a torn or damaged file is a message, never a traceback."""

import json
from pathlib import Path
from typing import Any

from minisft.errors import UserError


def read_json(path: Path, fix: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: of the file.
        fix: what the user can do where it is damaged.
        **fields: the types of the fields that it must have.

    Raises:
        UserError: it is not JSON, is no object, or lacks one of the fields.
        OSError: it cannot be read, as where there is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(path, f"this file is damaged ({_reason(error)})", fix) from None
    _require_fields(path, found, fix, fields)
    return dict(found)


def read_json_lines(path: Path, fix: str, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a file that is missing is empty.

    A torn last line is left out: the process that wrote it was killed, and the lines before it are whole.

    Raises:
        UserError: any other line is damaged or lacks one of the fields.
    """
    if not path.is_file():
        return []
    texts = path.read_bytes().split(b"\n")  # not at the other line ends that Unicode knows: they may stand in texts
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(texts) or not text:
                continue
            raise UserError(f"{path}:{number}", f"this line is damaged ({_reason(error)})", fix) from None
        _require_fields(f"{path}:{number}", line, fix, fields)
        lines.append(line)
    return lines


def _require_fields(where: object, found: Any, fix: str, fields: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise UserError(where, "this is damaged (no JSON object)", fix)
    for name, kind in fields.items():
        if not isinstance(found.get(name), kind):
            raise UserError(where, f"this is damaged (no valid field {name!r})", fix)


def _reason(error: ValueError) -> str:
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON: {error}"
