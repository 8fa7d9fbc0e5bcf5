"""One folder in the place of another: the old one keeps its name until the new one is ready.

The steps are renames, and each leaves either the old folder or the new one whole: NAME becomes NAME.old-N, NAME.new-N
becomes NAME; later NAME.old-N becomes NAME.deleted-N, of which only the files that MiniSFT wrote are deleted.
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
        kind: What it must be, "run" or "export".

    Raises:
        UserError: saying why.
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
    """Return the first of FOLDER.KIND-1, FOLDER.KIND-2, ... that is free."""
    numbered = (folder.with_name(f"{folder.name}.{kind}-{number}") for number in itertools.count(1))
    return next(path for path in numbered if not os.path.lexists(path))


def swap_folders(new: Path, final: Path, kind: str, replaces: Sequence[str] = ()) -> Path:
    """Give `new` the name `final`, and return the path that the folder of that name has got.

    Args:
        new: Path of a marked folder beside `final`.
        final: Path of the folder to replace.
        kind: "run" or "export".
        replaces: Names of older folders that `final` was replacing itself.

    Raises:
        OSError: a folder cannot be renamed; then `final` is what it was.
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
    """Return the folders beside a marked one that hold what it replaces, the newest first."""
    marker = read_marker(folder)
    place = folder.resolve()
    fits = re.compile(re.escape(place.name) + r"\.old-\d+")
    # A stranger may have written the marker: names that lead elsewhere are none.
    return [place.with_name(name) for name in (marker.replaces if marker else ()) if fits.fullmatch(name)]


def delete_replaced(folder: Path, kind: str) -> list[str]:
    """Delete what a folder has replaced; call it when the new one is good.

    Returns:
        A sentence for each folder that stays, since it holds what MiniSFT did not write.
    """
    olds = [old for old in replaced_folders(folder) if read_marker(old) is not None]
    if replaced_folders(folder):
        write_marker(folder, kind)  # from now on none of them comes back
    kept = []
    for old in olds:
        temporary = unused_name(folder.resolve(), "deleted")  # a later command goes on where this one is killed
        old.rename(temporary)
        kept.append(_delete(temporary, old))
    return [said for said in kept if said]


def restore_replaced(folder: Path, kind: str) -> bool:
    """Give what a folder has replaced its name back, and delete the folder; say whether there was any."""
    olds = replaced_folders(folder)
    if not olds or read_marker(olds[0]) is None:
        return False
    place = folder.resolve()
    failed = unused_name(place, "new")
    place.rename(failed)
    olds[0].rename(place)
    write_marker(place, kind, replaces=[old.name for old in olds[1:]])
    delete_written_files(failed)
    return True


def delete_leftovers(folder: Path) -> list[str]:
    """Delete what killed processes left beside `folder`: what was to replace it, and what was being deleted.

    Returns:
        A sentence for each that stays, since it holds what MiniSFT did not write.
    """
    place = folder.resolve()
    kept = []
    for kind in ("new", "deleted"):
        for path in sorted(place.parent.glob(f"{glob.escape(place.name)}.{kind}-*")):
            if path.is_dir() and not path.is_symlink() and read_marker(path) and not is_lock_held(path / ".lock"):
                kept.append(_delete(path, path))
    return [said for said in kept if said]


def _delete(temporary: Path, name: Path) -> str | None:
    foreign = delete_written_files(temporary)
    if not foreign:
        return None
    if not os.path.lexists(name):
        temporary.rename(name)
        temporary = name
    return f"{temporary} {KEPT_REASON}: {list_some(foreign)}"
