"""Replacing one folder by another: the old one keeps its name until the new one is ready.

All steps are renames, so that a process that is killed leaves the old folder or the new one complete: NAME becomes
NAME.old-N, and NAME.new-N becomes NAME; later NAME.old-N becomes NAME.deleted-N, of which only the files that MiniSFT
wrote are deleted.
"""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from minisft.errors import UserError
from minisft.files import is_lock_held
from minisft.manifest import delete_written_files, list_some, read_marker, write_marker

KEPT_REASON = "stays, since it holds what MiniSFT did not write"


def require_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace a folder that MiniSFT did not make, or that cannot be renamed.

    Args:
        folder: Path of the folder.
        kind: What the folder must be: "run" or "export".

    Raises:
        UserError: It cannot be replaced.
    """
    if os.path.ismount(folder):
        raise UserError(folder, "--force cannot replace a mount point", "name a folder inside it")
    marker = read_marker(folder)
    if marker is None or marker.kind != kind:
        raise UserError(
            folder,
            "--force replaces only what MiniSFT made in this very folder, and nothing here says so: it is a copy, "
            "came from another disk, or is of an earlier version",
            "delete it yourself, or name another folder",
        )


def unused_name(folder: Path, kind: str) -> Path:
    """Return the first path of FOLDER.KIND-1, FOLDER.KIND-2, ... that does not exist."""
    numbered = (folder.with_name(f"{folder.name}.{kind}-{number}") for number in itertools.count(1))
    return next(path for path in numbered if not os.path.lexists(path))


def swap_folders(new: Path, final: Path, kind: str, replaces: Sequence[str] = ()) -> Path:
    """Rename the folder `new` to `final`, and return the path to which the folder `final` was renamed.

    Args:
        new: Path of a marked folder beside `final`.
        final: Path of the folder to replace.
        kind: "run" or "export".
        replaces: Names of older folders that `final` itself was replacing.

    Raises:
        OSError: A folder cannot be renamed; `final` is then unchanged.
    """
    old = unused_name(final, "old")
    write_marker(new, kind, final, (old.name, *replaces))
    final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        old.rename(final)
        raise
    return old


def replaced_folders(folder: Path) -> list[Path]:
    """Return the folders beside a marked one that hold what it replaces, newest first."""
    marker = read_marker(folder)
    target = folder.resolve()
    old_name = re.compile(re.escape(target.name) + r"\.old-\d+")
    # The marker may be untrusted: names that lead to other places are left out.
    return [target.with_name(name) for name in (marker.replaces if marker else ()) if old_name.fullmatch(name)]


def delete_replaced(folder: Path, kind: str) -> list[str]:
    """Delete what a folder has replaced, now that the new one works.

    Returns:
        A message for each folder that stays, since it holds files that MiniSFT did not write.
    """
    olds = [old for old in replaced_folders(folder) if read_marker(old) is not None]
    if replaced_folders(folder):
        write_marker(folder, kind)  # from here on, none of them is restored
    kept = []
    for old in olds:
        temporary = unused_name(folder.resolve(), "deleted")  # if this process is killed, a later command continues
        old.rename(temporary)
        kept.append(_delete(temporary, old))
    return [message for message in kept if message]


def restore_replaced(folder: Path, kind: str) -> bool:
    """Delete a folder and rename what it replaced back to its name; return whether it had replaced anything."""
    olds = replaced_folders(folder)
    if not olds or read_marker(olds[0]) is None:
        return False
    target = folder.resolve()
    failed = unused_name(target, "new")
    target.rename(failed)
    olds[0].rename(target)
    write_marker(target, kind, replaces=[old.name for old in olds[1:]])
    delete_written_files(failed)
    return True


def delete_leftovers(folder: Path) -> list[str]:
    """Delete what killed processes left beside `folder`: new folders, and old ones that were being deleted.

    Returns:
        A message for each folder that stays, since it holds files that MiniSFT did not write.
    """
    target = folder.resolve()
    kept = []
    for kind in ("new", "deleted"):
        for path in sorted(target.parent.glob(f"{glob.escape(target.name)}.{kind}-*")):
            if path.is_dir() and not path.is_symlink() and read_marker(path) and not is_lock_held(path / ".lock"):
                kept.append(_delete(path, path))
    return [message for message in kept if message]


def _delete(temporary: Path, name: Path) -> str | None:
    """Delete a folder; if foreign files keep it alive, rename it back to `name` and return a message."""
    foreign = delete_written_files(temporary)
    if not foreign:
        return None
    if not os.path.lexists(name):
        temporary.rename(name)
        temporary = name
    return f"{temporary} {KEPT_REASON}: {list_some(foreign)}"
