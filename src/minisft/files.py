"""Paths, atomic writes, reading with clear messages, and locks."""

import contextlib
import difflib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.lock_files import hold_lock_file, is_lock_file_held
from minisft.manifest import record_files, record_folder, record_scratch_folder, refuse_foreign_files

# What a file system refuses: no room, a quota, a limit on a file's size, read-only or forbidden, a broken disk.
WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # from flock(2) on a file system without locks
_CHUNK_SIZE = 1 << 20  # bytes
_LOCK_RETRY = 0.05  # seconds between two tries for a lock


# --- paths ----------------------------------------------------------------------------------------------


def expand_user_path(text: str, where: str = "") -> Path:
    """Return the path that a user wrote, with a leading `~` or `~name` as that home folder.

    Every path of a recipe or of the command line passes through here once, before anything else looks at it. The
    path returned never begins with `~` (`./~` becomes absolute), so a library that expands paths leaves it as it is.

    Args:
        text: The path as the user wrote it.
        where: The key or option that holds it, for the message.

    Raises:
        UserError: The text is blank, holds a NUL character, or names the home of a user that does not exist.
    """
    if not text.strip():
        raise UserError(where or "a path", "the path is empty", "give the path of a file or a folder")
    if "\0" in text:
        raise UserError(where or text, "a path cannot hold a NUL character", "remove it")
    path = Path(text)
    if not text.startswith("~"):
        return path.absolute() if path.parts and path.parts[0].startswith("~") else path
    try:
        return path.expanduser()
    except RuntimeError:
        problem = f"{path.parts[0]} stands for a home folder that does not exist"
        fix = f"write ./{text} for a name that begins with ~, or the full path"
        raise UserError(where or text, problem, fix) from None


def nearest_path(path: Path) -> str:
    """Return the path in the same folder whose name is the most similar to one that does not exist; "" for none."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return str(path.with_name(close[0])) if close else ""


def is_pattern(path: Path) -> bool:
    """Return whether a path is a pattern as in a shell, such as data/*.jsonl."""
    return glob.has_magic(str(path))


def expand_pattern(pattern: Path) -> list[tuple[str, Path]]:
    """Return the files that match a pattern, sorted by name, each with its path from the first wildcard on.

    `*` and `?` stand for characters of one name, `[ab]` for one of several characters, `**` for any number of folders.
    Wildcards do not match hidden files and folders, `**` does not follow links, and folders are left out.

    Raises:
        UserError: The pattern is not valid.
    """
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root, wildcards = Path(*parts[:first]), parts[first:]
    wildcards = (*wildcards, "*") if wildcards[-1] == "**" else wildcards
    try:
        matches = [(path.relative_to(root), path) for path in root.glob("/".join(wildcards)) if path.is_file()]
    except (ValueError, NotImplementedError, re.error) as error:
        raise UserError(
            pattern, f"this is not a valid pattern of paths ({error})", "use *, ?, [ab] and ** as shells do"
        ) from None
    return sorted((name.as_posix(), path) for name, path in matches if not any(p.startswith(".") for p in name.parts))


def cache_folder() -> Path:
    """Return the folder for converted models and compiled code: $MINISFT_CACHE, else the user's cache folder."""
    if folder := os.environ.get("MINISFT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minisft"


# --- writing --------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a file beside `path` and rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    record_files(temporary, path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def write_folder_atomically(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it is renamed to `folder` when the block ends without an error.

    Where `folder` is a link to a folder, the folder that it leads to is replaced, and the link stays.

    Raises:
        UserError: `folder` holds files that MiniSFT did not write.
    """
    refuse_foreign_files(folder)
    target = folder.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    record_scratch_folder(temporary)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        record_folder(temporary, folder)
        refuse_foreign_files(folder)  # the user may have added something meanwhile
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary folders that killed processes left in `write_folder_atomically(folder)`."""
    target = folder.resolve()
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if re.fullmatch(r"\d+", path.suffix[1:]) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def apply_umask(folder: Path) -> None:
    """Set the permissions of the files that this process wrote in a folder to what the user's umask grants.

    safetensors writes files that only their owner can read, so that a team could not share a model.
    """
    umask = os.umask(0o077)  # the only way to read the umask is to set it; the next line restores it
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~umask)


# --- reading --------------------------------------------------------------------------------------------


def read_json(path: Path, fix: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: Path of the file.
        fix: What the user can do if the file is damaged.
        **fields: The fields that the object must have, with their types.

    Raises:
        UserError: The file is not JSON, is not an object, or lacks one of the fields.
        OSError: The file cannot be read, for example because it does not exist.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(path, f"this file is damaged ({_reason(error)})", fix) from None
    _require_fields(path, content, fix, fields)
    return dict(content)


def read_json_lines(path: Path, fix: str, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line; a missing file is empty.

    An incomplete last line is left out: the process that wrote it was killed, and the lines before it are complete.

    Raises:
        UserError: Any other line is damaged or lacks one of the fields.
    """
    if not path.is_file():
        return []
    raw_lines = path.read_bytes().split(b"\n")  # splitlines would also split at Unicode's line ends, inside texts
    lines = []
    for number, raw in enumerate(raw_lines, 1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            if number == len(raw_lines) or not raw:
                continue
            raise UserError(f"{path}:{number}", f"this line is damaged ({_reason(error)})", fix) from None
        _require_fields(f"{path}:{number}", line, fix, fields)
        lines.append(line)
    return lines


def _require_fields(where: object, content: Any, fix: str, fields: dict[str, Any]) -> None:
    if not isinstance(content, dict):
        raise UserError(where, "this is damaged (not a JSON object)", fix)
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise UserError(where, f"this is damaged (no valid field {name!r})", fix)


def _reason(error: ValueError) -> str:
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON: {error}"


def hash_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256, in hex, of the names and the content of files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_SIZE):
                digest.update(chunk)
    return digest.hexdigest()


def refuse_huge_files(folder: Path, largest: Mapping[str, int]) -> None:
    """Refuse a folder in which a file that should be small is huge: reading it could use up all memory.

    Args:
        folder: Path of the folder, which may be untrusted.
        largest: The maximum size in bytes, by the pattern of names that it holds for.

    Raises:
        UserError: A file is larger; the message names it.
    """
    for pattern, limit in largest.items():
        for path in folder.glob(pattern):
            size = path.stat().st_size if path.is_file() else 0
            if size > limit:
                problem = f"it has {size / 1e6:,.0f} MB, and a file of this kind has at most {limit / 1e6:,.0f} MB"
                raise UserError(path, problem, "delete it, and do not trust where it came from")


# --- locks ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold_lock(path: Path, patience: float = 1.0) -> Iterator[None]:
    """Hold the lock file `path`, which is created; the kernel releases the lock when this process ends, even if killed.

    Where the file system has no such locks, `lock_files` holds it by a second file.

    The package filelock would not make this shorter: it has no test that neither creates nor takes the lock (see
    `is_lock_held`), and by default it falls back to a lock that outlives a killed process.

    Args:
        path: Path of the lock file. Nothing is written to it; a link or a pipe in its place is an error.
        patience: Seconds to try for; a process that only tests the lock holds it for a moment.

    Raises:
        BlockingIOError: Another process holds the lock.
        UserError: The name is taken by something else; or the file system has no locks, and a process of another host
            seems to hold this one.
    """
    deadline = time.monotonic() + patience
    if not path.exists():
        record_files(path)
    handle = _open_lock(path)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, handle)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                stack.enter_context(hold_lock_file(path, deadline, _LOCK_RETRY))
                break
            time.sleep(_LOCK_RETRY)
        yield


def is_lock_held(path: Path) -> bool:
    """Return whether a process holds the lock file `path`, without creating or writing anything."""
    if not os.path.lexists(path):
        return False
    handle = _open_lock(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return is_lock_file_held(path)
    finally:
        os.close(handle)
    return False


def _open_lock(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a lock file without following a link, which could open or create a file somewhere else."""
    taken = UserError(path, "this name is MiniSFT's lock file, and something else has it", "move that somewhere else")
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise taken from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise taken
    return handle
