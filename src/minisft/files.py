"""Files that are whole or absent, and fingerprints of their content."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from minisft.errors import UserError

# What a file system refuses: no room, a quota, a limit on a file's size, read-only or forbidden, a broken disk.
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_CHUNK = 1 << 20
_RETRY = 0.05  # seconds between two tries for a lock


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


def clear_scratch(folder: Path) -> None:
    """Remove a folder that this program writes anew each time; a link in its place goes, and what it names stays."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


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
                what = f"it has {size / 1e6:,.0f} MB, and a file of this kind has at most {limit / 1e6:,.0f} MB"
                raise UserError(path, what, "delete it, and do not trust where it came from")


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
