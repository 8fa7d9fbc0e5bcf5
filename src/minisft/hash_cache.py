"""Hashes of large files, kept from one start to the next: the weights of a 7B model have 14 GB.

A hash is found again by the paths of the files, and holds as long as the size, the times and the inode of each file are
the same: git's index trusts the same fields. The time of the last change of the inode (ctime) is among them, which no
program can set, so a file is read again even where its time of modification was set back.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from minisft.files import cache_folder, hash_files, write_atomically

# A file that was changed this recently may be changed again without a new time: clocks of file systems tick coarsely.
_SETTLED = 2.0  # seconds


def hash_files_once(paths: Sequence[Path], settled: float = _SETTLED) -> str:
    """Return what `hash_files` does, without reading files that were hashed before and have not changed since.

    The cache is a file for each list of paths, in the folder `hashes` of the cache folder. One that is damaged or
    cannot be written does no harm: the files are hashed again.

    Args:
        paths: Files to hash together, in this order.
        settled: Seconds since the last change after which the hash of a file is kept.
    """
    files = _describe(paths)
    key = hashlib.sha256("\0".join(str(file[0]) for file in files).encode()).hexdigest()
    entry = cache_folder() / "hashes" / f"{key[:32]}.json"
    known = _read(entry, files)
    if known is not None:
        return known
    started = time.time_ns()
    found = hash_files(paths)
    changed_at = max((max(file[2:4]) for file in files), default=0)  # type: ignore[type-var]  # both are numbers
    if _describe(paths) == files and started - int(changed_at) > settled * 1e9:
        with contextlib.suppress(OSError):
            write_atomically(entry, json.dumps({"files": files, "sha256": found}))
    return found


def _describe(paths: Sequence[Path]) -> list[list[str | int]]:
    """Return path, size, times and inode of each file; links are followed."""
    described: list[list[str | int]] = []
    for path in paths:
        status = path.stat()
        described.append(
            [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, path.name]
        )
    return described


def _read(entry: Path, files: list[list[str | int]]) -> str | None:
    try:
        stored = json.loads(entry.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(stored, dict) or stored.get("files") != files:
        return None
    found = stored.get("sha256")
    return found if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{64}", found) else None
