"""Files that are whole or absent, and fingerprints of their content."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from minisft.errors import UserError

# What a file system refuses: no room, a quota, a limit on a file's size, read-only or forbidden, a broken disk.
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_CHUNK = 1 << 20
_RETRY = 0.05  # seconds between two tries for a lock


def user_path(text: str, where: str = "") -> Path:
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
        what = f"{path.parts[0]} stands for a home folder that does not exist"
        fix = f"write ./{text} for a name that begins with ~, or the full path"
        raise UserError(where or text, what, fix) from None


def is_pattern(path: Path) -> bool:
    """Say whether a path is a pattern such as data/*.jsonl, as shells have them."""
    return glob.has_magic(str(path))


def files_of_pattern(pattern: Path) -> list[tuple[str, Path]]:
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
    """Write `text` aside and rename it into place: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
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


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill; it takes the name `folder` only when the block ends without an error."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def hold_lock(path: Path, patience: float = 1.0) -> Iterator[None]:
    """Hold the lock file `path`, which this makes; the lock ends with its holder, however that dies.

    Args:
        path: of the file.
        patience: seconds to try; another process may only look whether the lock is held.

    Raises:
        BlockingIOError: it is held.
    """
    end = time.monotonic() + patience
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
            time.sleep(_RETRY)
        yield


def cache_folder() -> Path:
    """Return where converted models are kept: $MINISFT_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("MINISFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minisft"
