"""Which files in a folder MiniSFT wrote: the only ones that it ever deletes.

A run, or an exported model, begins with two small files. The marker says that MiniSFT made this very folder: it holds
the folder's own identity, so that a copy of the marker in another folder says nothing. The manifest lists each file
before it gets its name, one JSON string a line; a line that ends in "/" stands for a scratch folder with all that is in
it. Whatever the manifest does not list, and every link, is the user's: it is never deleted and never written through.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minisft.errors import UserError

MARKER = ".minisft.json"
MANIFEST = ".minisft.files"
_OWN = (".lock", f"{MARKER}.new", MANIFEST, MARKER)  # in the order in which they may go
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)  # ELOOP: a link, ENXIO: a socket
_SHOWN = 5  # names of foreign files in a message


@dataclass(frozen=True)
class Marker:
    """What the marker of a folder says.

    Args:
        kind: "run" or "export".
        inode: the folder's number in its file system; it stays when the folder is moved there.
        path: SHA-256 of the folder's path; it stays when a file system gives out new numbers.
        replaces: names of folders beside this one that hold what it replaces, until they are deleted.
    """

    kind: str
    inode: int
    path: str
    replaces: tuple[str, ...] = ()


def write_marker(folder: Path, kind: str, path: Path | None = None, replaces: Sequence[str] = ()) -> None:
    """Write the marker of a folder that MiniSFT made, or change what it replaces.

    Args:
        folder: the folder.
        kind: "run" or "export".
        path: where the folder is going to be, if that is somewhere else.
        replaces: names of folders beside it.
    """
    marker = Marker(kind, folder.stat().st_ino, _hash(path or folder), tuple(replaces))
    append_to_regular_file(folder / MANIFEST, "")
    temporary = folder / f"{MARKER}.new"
    temporary.write_text(json.dumps(vars(marker)) + "\n", encoding="utf-8")
    temporary.replace(folder / MARKER)


def mark_new_folder(folder: Path, kind: str) -> None:
    """Make a folder and mark it, unless there is something in it already."""
    if not folder.is_dir() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        write_marker(folder, kind)


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of a folder, or None where MiniSFT did not make it: a copied marker counts as none."""
    try:
        found = json.loads(_read_regular_file(folder / MARKER))
        marker = Marker(str(found["kind"]), int(found["inode"]), str(found["path"]), tuple(map(str, found["replaces"])))
        same = marker.inode == folder.stat().st_ino or marker.path == _hash(folder)
    except (ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    return marker if same else None


def record_files(*paths: Path) -> None:
    """List files that are about to be written in the manifest of the marked folder that holds them, if one does."""
    _add_to_manifest(dict.fromkeys(paths, ""))


def record_scratch_folder(folder: Path) -> None:
    """List a folder that is about to be made, and is wholly MiniSFT's, in the manifest of the marked one around it."""
    _add_to_manifest({folder: "/"})


def record_folder(made: Path, name: Path) -> None:
    """List the files of the folder `made` under the name that it is about to get."""
    _add_to_manifest({name / path.relative_to(made): "" for path in _files(made)})


def foreign_files(folder: Path) -> list[str]:
    """Return what MiniSFT did not write in a folder, relative to it: all of it, where no marked folder is around it."""
    root = _marked_root(folder)
    if root is None or read_marker(root) is None:
        return [path.relative_to(folder).as_posix() for path in _files(folder)]
    listed, inside = _Manifest.of(root), folder.absolute().relative_to(root)
    found = []
    for path in _files(folder):
        name = path.relative_to(folder)
        if path.is_symlink() or not listed.holds(inside / name):
            found.append(name.as_posix())
    return found


def in_marked_folder(path: Path) -> bool:
    """Say whether a marked folder is around `path`, so that its manifest tells what MiniSFT wrote."""
    root = _marked_root(path)
    return root is not None and read_marker(root) is not None


def size_of_written_files(folder: Path) -> int:
    """Return the size of the files of a marked folder that MiniSFT wrote."""
    listed = _Manifest.of(folder)
    return sum(
        path.lstat().st_size
        for path in _files(folder)
        if not path.is_symlink() and listed.holds(path.relative_to(folder))
    )


def delete_written_files(folder: Path) -> list[str]:
    """Delete what MiniSFT wrote in a marked folder, and the folder itself where nothing else is in it.

    Called again, it goes on where it was broken off.

    Returns:
        What stays, since somebody else wrote it: paths relative to the folder.
    """
    assert read_marker(folder) is not None, f"{folder} is not MiniSFT's to delete"
    listed = _Manifest.of(folder)
    foreign = []
    for path in _files(folder):
        name = path.relative_to(folder)
        if path.is_symlink() or not listed.holds(name):
            foreign.append(name.as_posix())
        elif name.as_posix() not in _OWN:
            path.unlink()
    _remove_empty(folder)
    if not foreign:
        for own in _OWN:
            (folder / own).unlink(missing_ok=True)
        folder.rmdir()
    return foreign


def make_scratch_folder(folder: Path) -> None:
    """Make an empty folder that is wholly MiniSFT's, in place of one that a killed process left.

    Raises:
        UserError: there is something of that name that MiniSFT did not make.
    """
    delete_scratch_folder(folder)
    record_scratch_folder(folder)
    folder.mkdir(parents=True)
    write_marker(folder, "scratch")


def delete_scratch_folder(folder: Path) -> None:
    """Delete a folder of `make_scratch_folder` with all that is in it.

    Raises:
        UserError: there is something of that name that MiniSFT did not make.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or read_marker(folder) is None:
        raise UserError(folder, "MiniSFT needs this name for itself, and something else has it", "rename that")
    shutil.rmtree(folder)


def refuse_foreign_files(folder: Path) -> None:
    """Refuse to replace a folder that holds what MiniSFT did not write.

    Raises:
        UserError: naming some of it.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(folder, "there is a file where MiniSFT writes a folder", "move it, or choose another `output`")
    foreign = foreign_files(folder)
    if foreign:
        problem = f"it would be replaced, and holds what MiniSFT did not write: {list_some(foreign)}"
        raise UserError(folder, problem, "move that somewhere else, or choose another `output`")


def list_some(names: Sequence[str]) -> str:
    """Return some names, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass(frozen=True)
class _Manifest:
    """What a manifest lists, as POSIX paths relative to its folder."""

    files: frozenset[str]
    scratch: frozenset[str]

    @classmethod
    def of(cls, root: Path) -> "_Manifest":
        """Read a manifest; lines that lead out of the folder, which a stranger may have written, are left out."""
        try:
            lines = _read_regular_file(root / MANIFEST).splitlines()
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            lines = []
        names = {name for line in lines if (name := _name_in(line)) is not None}
        scratch = frozenset(name.rstrip("/") for name in names if name.endswith("/"))
        return cls(frozenset(name for name in names if not name.endswith("/")), scratch)

    def holds(self, name: Path) -> bool:
        """Say whether MiniSFT wrote the file `name`."""
        if name.as_posix() in self.files or name.as_posix() in _OWN:
            return True
        return any(parent.as_posix() in self.scratch for parent in name.parents)


def _name_in(line: str) -> str | None:
    try:
        name = json.loads(line)
    except ValueError:  # the last line of a process that was killed
        return None
    if not isinstance(name, str) or not name.strip("/"):
        return None
    parts = PurePosixPath(name).parts
    return None if name.startswith("/") or ".." in parts or parts == (".",) else name


def _files(folder: Path) -> Iterable[Path]:
    """Yield everything in a folder but folders: files, and links as links. No link is followed."""
    for parent, folders, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)
        yield from (Path(parent, name) for name in folders if Path(parent, name).is_symlink())


def _remove_empty(folder: Path) -> None:
    """Remove the folders in `folder` in which nothing is left."""
    for parent, _, _ in os.walk(folder, topdown=False):
        if parent != str(folder):
            with contextlib.suppress(OSError):  # something is left
                Path(parent).rmdir()


def _marked_root(path: Path) -> Path | None:
    """Return the nearest folder around `path`, or itself, that has a manifest."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if os.path.lexists(folder / MANIFEST)), None)


def _add_to_manifest(paths: dict[Path, str]) -> None:
    if not paths:
        return
    root = _marked_root(next(iter(paths)).parent)
    if root is None:
        return
    listed = _Manifest.of(root)
    names = {path.absolute().relative_to(root).as_posix(): end for path, end in paths.items()}
    new = [name + end for name, end in names.items() if name not in (listed.scratch if end else listed.files)]
    if new:
        append_to_regular_file(root / MANIFEST, "".join(json.dumps(name) + "\n" for name in new))


def append_to_regular_file(path: Path, text: str) -> None:
    """Append to a file in one write; a link in its place is an error (ELOOP), not followed."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        os.write(handle, text.encode("utf-8"))
    finally:
        os.close(handle)


def _read_regular_file(path: Path) -> str:
    """Return the text of a plain file; links, pipes and devices are errors."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 (a handle)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.ENXIO, "not a plain file", str(path))
        return file.read()


def _hash(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
