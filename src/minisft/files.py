"""Files: atomic writes, locks, hashes, path patterns, and JSON that is read with clear messages."""

import contextlib
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
from minisft.manifest import record_files, record_folder, record_scratch_folder, refuse_foreign_files

# What a file system refuses: no room, a quota, a limit on a file's size, read-only or forbidden, a broken disk.
WRITE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_CHUNK = 1 << 20
_RETRY = 0.05  # seconds between two tries for a lock


def expand_user_path(text: str, where: str = "") -> Path:
    """Return the path that a user wrote, with a leading `~` or `~name` as that home folder.

    Every path of a recipe or of the command line passes through here once, before anything else looks at it. The
    path returned never begins with `~` (`./~` becomes absolute), so a library that expands paths leaves it as it is.

    Args:
        text: the path as it was written.
        where: the key or option that holds it, for the message.

    Raises:
        UserError: the text is blank, holds a NUL character, or names the home of a user that does not exist.
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


def is_pattern(path: Path) -> bool:
    """Say whether a path is a pattern such as data/*.jsonl, as shells have them."""
    return glob.has_magic(str(path))


def expand_pattern(pattern: Path) -> list[tuple[str, Path]]:
    """Return the files that match a pattern, by name; each with its name from the first wildcard on.

    `*` and `?` stand for characters of one name, `[ab]` for one of some, `**` for any number of folders. Hidden files
    and folders match no wildcard, and `**` follows no links. Folders are no match.

    Raises:
        UserError: the pattern cannot be one.
    """
    parts = pattern.parts
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    root, wild = Path(*parts[:first]), parts[first:]
    wild = (*wild, "*") if wild[-1] == "**" else wild
    try:
        found = [(path.relative_to(root), path) for path in root.glob("/".join(wild)) if path.is_file()]
    except (ValueError, NotImplementedError, re.error) as error:
        raise UserError(
            pattern, f"this is no pattern of paths ({error})", "use *, ?, [ab] and ** as shells do"
        ) from None
    return sorted((name.as_posix(), path) for name, path in found if not any(p.startswith(".") for p in name.parts))


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


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256, in hex, over the names and the bytes of `paths`, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def refuse_huge_files(folder: Path, largest: Mapping[str, int]) -> None:
    """Refuse a folder in which a small file is huge: reading it would take all the memory there is.

    Args:
        folder: which may be a stranger's.
        largest: by a pattern of names, the bytes that such a file has at most.

    Raises:
        UserError: naming the file.
    """
    for pattern, limit in largest.items():
        for path in folder.glob(pattern):
            size = path.stat().st_size if path.is_file() else 0
            if size > limit:
                problem = f"it has {size / 1e6:,.0f} MB, and a file of this kind has at most {limit / 1e6:,.0f} MB"
                raise UserError(path, problem, "delete it, and do not trust where it came from")


@contextlib.contextmanager
def write_folder_atomically(folder: Path) -> Iterator[Path]:
    """Give a folder to fill; it takes the name `folder` only when the block ends without an error.

    Where `folder` is a link to a folder, the folder that it leads to is replaced, and the link stays.

    Raises:
        UserError: `folder` holds what MiniSFT did not write.
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
        refuse_foreign_files(folder)  # something may have come meanwhile
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of making `folder` with `write_folder_atomically`."""
    target = folder.resolve()
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if re.fullmatch(r"\d+", path.suffix[1:]) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def hold_lock(path: Path, patience: float = 1.0) -> Iterator[None]:
    """Hold the lock file `path`, which this makes; the lock ends with its holder, however that dies.

    Args:
        path: Path of the lock file. Nothing is written to it, and a link or a pipe in its place is an error.
        patience: Seconds to try; another process may only look whether the lock is held.

    Raises:
        BlockingIOError: it is held.
        UserError: something else has that name.
    """
    end = time.monotonic() + patience
    if not path.exists():
        record_files(path)
    handle = _open_lock(path)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
            time.sleep(_RETRY)
        yield
    finally:
        os.close(handle)


def is_lock_held(path: Path) -> bool:
    """Say whether a process holds the lock file `path`; nothing is made or written."""
    if not os.path.lexists(path):
        return False
    handle = _open_lock(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _open_lock(path: Path, how: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a lock file and nothing else: through a link, another file would be opened or made."""
    try:
        handle = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _no_lock_file(path) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _no_lock_file(path)
    return handle


def _no_lock_file(path: Path) -> UserError:
    return UserError(path, "this name is MiniSFT's lock file, and something else has it", "move that somewhere else")


def cache_folder() -> Path:
    """Return where converted models are kept: $MINISFT_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("MINISFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minisft"


def apply_umask(folder: Path) -> None:
    """Give the files in a folder that this process wrote the permissions that the user's umask grants to new files.

    The writer of safetensors makes its files for their owner alone, who could then share no model.
    """
    umask = os.umask(0o077)  # there is no other way to read it, and it is set back at once
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~umask)


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
