"""The thumbs of the chat page: each click appends one JSON line to the run's file of preferences."""

import contextlib
import errno
import json
import math
import os
import stat
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.errors import UserError
from minisft.files import WRITE_ERRNOS, hold_lock
from minisft.manifest import record_files
from minisft.run_start import refuse_untrusted_links

if TYPE_CHECKING:
    from fastapi import FastAPI

FILE_NAME = "preferences.jsonl"
LARGEST_ENTRY = 1 << 20  # bytes of a request, above any conversation that fits a context
LARGEST_FILE = 1 << 30  # bytes; a page that sends without end must not fill the disk
_MOST_MESSAGES = 1000
_LONGEST_NAME = 300  # characters of a model's name
_MOST_SETTINGS = 32
_DEEPEST = 20  # levels of lists and objects in a message
_ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("model", "messages", "answer", "rating", "settings")
_WHERE = "the preference"
_PATIENCE = 10.0  # seconds to wait for another append


def read_preference(body: bytes) -> dict[str, Any]:
    """Return the preference in the body of a request, with the keys that the file holds and no others.

    Args:
        body: JSON with `model`, `messages`, `answer`, `rating` ("up" or "down") and, if sampled, `settings`.

    Raises:
        UserError: The body is not such an object; the message names the key.
    """
    if len(body) > LARGEST_ENTRY:
        raise UserError(_WHERE, f"it has more than {LARGEST_ENTRY:,} bytes", "rate a shorter conversation")
    try:
        entry = json.loads(body, parse_constant=_refuse_constant)
        json.dumps(entry, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        raise UserError(_WHERE, "it is not JSON of valid text", "send one JSON object in UTF-8") from None
    if not isinstance(entry, dict):
        raise UserError(_WHERE, "it is not a JSON object", f"send an object with {', '.join(_KEYS)}")
    entry.setdefault("settings", {})
    for name in _KEYS:
        if name not in entry:
            raise UserError(f"{_WHERE}: {name}", "it is missing", f"send an object with {', '.join(_KEYS)}")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise UserError(f"{_WHERE}: {unknown[0][:80]!r}", "this key is not known", f"send only {', '.join(_KEYS)}")
    _check_values(entry)
    return {name: entry[name] for name in _KEYS}


def append_preference(path: Path, entry: dict[str, Any]) -> None:
    """Append a preference and its time, in UTC, to a file as one line of JSON.

    The line is written in full or not at all, one process at a time. Nothing is written through a link.

    Args:
        path: Path of the file, directly in the folder of a run; it is created.
        entry: What `read_preference` returned.

    Raises:
        UserError: The file cannot be written, or the run was made elsewhere and has links that lead out of it.
    """
    refuse_untrusted_links(path.parent)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({"time": time, **entry}, ensure_ascii=False).encode("utf-8") + b"\n"
    try:
        with hold_lock(path.with_name(f".{path.name}.lock"), _PATIENCE):
            _append_line(path, line)
    except BlockingIOError:
        raise UserError(path, "another process is writing to it", "try again") from None
    except OSError as error:
        if error.errno not in WRITE_ERRNOS:
            raise
        raise UserError(path, f"it cannot be written ({os.strerror(error.errno)})", "make room or allow it") from None


def add_preferences_route(app: "FastAPI", path: Path) -> None:
    """Add `POST /preferences` to a server: 200 when the preference is in the file, otherwise an ApiError.

    Args:
        app: The server, which refuses requests of other web pages and without its key, and answers ApiErrors.
        path: Path of the file that the preferences are appended to.
    """
    from fastapi import Request
    from starlette.concurrency import run_in_threadpool

    from minisft.serving.guards import read_body
    from minisft.serving.protocol import ApiError

    async def post_preference(request: Request) -> dict[str, bool]:
        body = await read_body(request.scope, request.receive)
        try:
            entry = read_preference(body)
        except UserError as error:
            status = 413 if len(body) > LARGEST_ENTRY else 422
            raise ApiError(status, f"{error.where}: {error.problem}; {error.fix}") from None
        try:
            await run_in_threadpool(append_preference, path, entry)
        except UserError as error:
            raise ApiError(409, f"{error.where}: {error.problem}; {error.fix}") from None
        return {"saved": True}

    app.add_api_route("/preferences", post_preference, methods=["POST"], response_model=None)


def _check_values(entry: dict[str, Any]) -> None:
    """Refuse a value of the wrong type, and what is too long or nested too deep."""
    model, messages, settings = entry["model"], entry["messages"], entry["settings"]
    if not isinstance(model, str) or not 0 < len(model) <= _LONGEST_NAME:
        raise UserError(f"{_WHERE}: model", "it is not the name of a model", "send the name as a text")
    if not isinstance(entry["answer"], str):
        raise UserError(f"{_WHERE}: answer", "it is not a text", "send the answer as a text")
    if entry["rating"] not in ("up", "down"):
        raise UserError(f"{_WHERE}: rating", "it is neither up nor down", 'send "up" or "down"')
    if not isinstance(messages, list) or not 0 < len(messages) <= _MOST_MESSAGES:
        problem = f"it is not a list of 1 to {_MOST_MESSAGES:,} messages"
        raise UserError(f"{_WHERE}: messages", problem, "send the messages before the answer")
    for number, message in enumerate(messages, 1):
        content = message.get("content") if isinstance(message, dict) else None
        valid = isinstance(message, dict) and message.get("role") in _ROLES and isinstance(content, str | None)
        if not valid or _is_deeper(message, _DEEPEST):
            problem = "this is not a message with a role and a text"
            raise UserError(f"{_WHERE}: messages, message {number}", problem, f"use the roles {', '.join(_ROLES)}")
    if (
        not isinstance(settings, dict)
        or len(settings) > _MOST_SETTINGS
        or not all(isinstance(value, str | int | float | None) for value in settings.values())
        or not all(math.isfinite(value) for value in settings.values() if isinstance(value, float))
    ):
        problem = f"it is not an object of at most {_MOST_SETTINGS} numbers and texts"
        raise UserError(f"{_WHERE}: settings", problem, "send the sampling settings of the request")


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether a value of JSON has more than so many levels of lists and objects."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in inner)


def _append_line(path: Path, line: bytes) -> None:
    """Append a line to a regular file in full, or leave the file as it was; a link in its place is an error."""
    taken = UserError(
        path, "this name is MiniSFT's file of preferences, and something else has it", "move it elsewhere"
    )
    if not os.path.lexists(path):
        record_files(path)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise taken from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise taken
        size = status.st_size
        if size + len(line) > LARGEST_FILE:
            raise UserError(path, f"it would have more than {LARGEST_FILE:,} bytes", "move it somewhere else")
        if size and os.pread(handle, 1, size - 1) != b"\n":  # a process was killed in the middle of a line
            line = b"\n" + line
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(handle, line[written:], size + written)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
