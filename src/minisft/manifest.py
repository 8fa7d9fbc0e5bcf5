"""The record of which files in a folder MiniSFT wrote: it never deletes any others.

A run folder and an exported model begin with two small files. The marker says that MiniSFT made this folder: it holds
the folder's own identity, so that a copy of the marker in another folder is not valid. The manifest lists each file
before it is created, one JSON string per line; a name that ends in "/" is a scratch folder with everything in it.
Every link, and every file that the manifest does not list, belongs to the user: MiniSFT never deletes it and never
writes through it.
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
_OWN = (".lock", f"{MARKER}.new", MANIFEST, MARKER)  # in the order in which they are deleted
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)  # ELOOP: a link, ENXIO: a socket
_MAX_SHOWN = 5  # names of foreign files in a message


@dataclass(frozen=True)
class Marker:
    """The content of a marker file.

    Args:
        kind: "run", "export" or "scratch".
        inode: Inode number of the folder; it does not change when the folder is moved within its file system.
        path: SHA-256 of the folder's path; it does not change when a file system assigns new inode numbers.
        replaces: Names of folders beside this one that hold what it replaces, until they are deleted.
    """

    kind: str
    inode: int
    path: str
    replaces: tuple[str, ...] = ()


def write_marker(folder: Path, kind: str, path: Path | None = None, replaces: Sequence[str] = ()) -> None:
    """Write the marker of a folder that MiniSFT made, or update the list of what it replaces.

    Args:
        folder: Path of the folder.
        kind: "run", "export" or "scratch".
        path: Path that the folder is going to have, if it differs.
        replaces: Names of folders beside it that it replaces.
    """
    marker = Marker(kind, folder.stat().st_ino, _hash(path or folder), tuple(replaces))
    _append_to_regular_file(folder / MANIFEST, "")
    temporary = folder / f"{MARKER}.new"
    temporary.write_text(json.dumps(vars(marker)) + "\n", encoding="utf-8")
    temporary.replace(folder / MARKER)


def mark_new_folder(folder: Path, kind: str) -> None:
    """Create a folder and mark it, unless it exists and is not empty."""
    if not folder.is_dir() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        write_marker(folder, kind)


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of a folder, or None if MiniSFT did not make the folder; a copied marker gives None."""
    try:
        entry = json.loads(_read_regular_file(folder / MARKER))
        marker = Marker(str(entry["kind"]), int(entry["inode"]), str(entry["path"]), tuple(map(str, entry["replaces"])))
        is_original = marker.inode == folder.stat().st_ino or marker.path == _hash(folder)
    except (ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise
    return marker if is_original else None


def record_files(*paths: Path) -> None:
    """Add files that are about to be written to the manifest of the marked folder around them, if there is one."""
    _add_to_manifest(dict.fromkeys(paths, ""))


def record_scratch_folder(folder: Path) -> None:
    """Add a folder that is about to be created, for MiniSFT's files only, to the manifest of the folder around it."""
    _add_to_manifest({folder: "/"})


def record_folder(made: Path, name: Path) -> None:
    """Add the files of the folder `made` to the manifest, under the name that the folder is about to get."""
    _add_to_manifest({name / path.relative_to(made): "" for path in _files(made)})


def foreign_files(folder: Path) -> list[str]:
    """Return the files in a folder that MiniSFT did not write, as paths relative to it.

    These are all files where the folder is not in a marked one.
    """
    root = _marked_root(folder)
    if root is None or read_marker(root) is None:
        return [path.relative_to(folder).as_posix() for path in _files(folder)]
    manifest, folder_name = _Manifest.read(root), folder.absolute().relative_to(root)
    names = [(path, path.relative_to(folder)) for path in _files(folder)]
    return [name.as_posix() for path, name in names if path.is_symlink() or not manifest.holds(folder_name / name)]


def in_marked_folder(path: Path) -> bool:
    """Return whether `path` is in a marked folder, whose manifest lists what MiniSFT wrote."""
    root = _marked_root(path)
    return root is not None and read_marker(root) is not None


def size_of_written_files(folder: Path) -> int:
    """Return the size, in bytes, of the files that MiniSFT wrote in a marked folder."""
    manifest = _Manifest.read(folder)
    return sum(
        path.lstat().st_size
        for path in _files(folder)
        if not path.is_symlink() and manifest.holds(path.relative_to(folder))
    )


def delete_written_files(folder: Path) -> list[str]:
    """Delete the files that MiniSFT wrote in a marked folder, and the folder itself if that empties it.

    A deletion that was interrupted can be continued by another call.

    Returns:
        The files that stay, since MiniSFT did not write them: paths relative to the folder.
    """
    assert read_marker(folder) is not None, f"{folder} is not MiniSFT's to delete"
    manifest = _Manifest.read(folder)
    foreign = []
    for path in _files(folder):
        name = path.relative_to(folder)
        if path.is_symlink() or not manifest.holds(name):
            foreign.append(name.as_posix())
        elif name.as_posix() not in _OWN:
            path.unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        if parent != str(folder):
            with contextlib.suppress(OSError):  # not empty
                Path(parent).rmdir()
    if not foreign:
        for own in _OWN:
            (folder / own).unlink(missing_ok=True)
        folder.rmdir()
    return foreign


def make_scratch_folder(folder: Path) -> None:
    """Create an empty folder for MiniSFT's files only, in place of one that a killed process left.

    Raises:
        UserError: Something with that name exists that MiniSFT did not make.
    """
    delete_scratch_folder(folder)
    record_scratch_folder(folder)
    folder.mkdir(parents=True)
    write_marker(folder, "scratch")


def delete_scratch_folder(folder: Path) -> None:
    """Delete a folder of `make_scratch_folder` with everything in it.

    Raises:
        UserError: Something with that name exists that MiniSFT did not make.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or read_marker(folder) is None:
        raise UserError(folder, "MiniSFT needs this name for itself, and something else has it", "rename that")
    shutil.rmtree(folder)


def refuse_foreign_files(folder: Path) -> None:
    """Refuse to replace a folder that holds files that MiniSFT did not write.

    Raises:
        UserError: There are such files; the message names some of them.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(folder, "there is a file where MiniSFT writes a folder", "move it, or choose another `output`")
    foreign = foreign_files(folder)
    if foreign:
        problem = f"it would be replaced, and holds what MiniSFT did not write: {list_some(foreign)}"
        raise UserError(folder, problem, "move that somewhere else, or choose another `output`")


def list_some(names: Sequence[str]) -> str:
    """Return the first few names as text, with the number of the others."""
    more = f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more


@dataclass(frozen=True)
class _Manifest:
    """The content of a manifest: POSIX paths of files and of scratch folders, relative to its folder."""

    files: frozenset[str]
    scratch: frozenset[str]

    @classmethod
    def read(cls, root: Path) -> "_Manifest":
        """Read a manifest, which may be untrusted: names that lead out of the folder are left out."""
        try:
            lines = _read_regular_file(root / MANIFEST).splitlines()
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            lines = []
        files, scratch = set(), set()
        for line in lines:
            try:
                name = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            if not isinstance(name, str) or not name.strip("/"):
                continue
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or parts == (".",):
                continue
            if name.endswith("/"):
                scratch.add(name.rstrip("/"))
            else:
                files.add(name)
        return cls(frozenset(files), frozenset(scratch))

    def holds(self, name: Path) -> bool:
        """Return whether MiniSFT wrote the file `name`."""
        if name.as_posix() in self.files or name.as_posix() in _OWN:
            return True
        return any(parent.as_posix() in self.scratch for parent in name.parents)


def _files(folder: Path) -> Iterable[Path]:
    """Yield all files and links below a folder; links are not followed."""
    for parent, folders, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)
        yield from (Path(parent, name) for name in folders if Path(parent, name).is_symlink())


def _marked_root(path: Path) -> Path | None:
    """Return the nearest folder with a manifest: `path` itself or one of its parents."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if os.path.lexists(folder / MANIFEST)), None)


def _add_to_manifest(paths: dict[Path, str]) -> None:
    """Append paths that are not in the manifest yet, each with its suffix: "/" for a scratch folder, "" for a file."""
    if not paths:
        return
    root = _marked_root(next(iter(paths)).parent)
    if root is None:
        return
    manifest = _Manifest.read(root)
    names = {path.absolute().relative_to(root).as_posix(): suffix for path, suffix in paths.items()}
    new = [name + end for name, end in names.items() if name not in (manifest.scratch if end else manifest.files)]
    if new:
        _append_to_regular_file(root / MANIFEST, "".join(json.dumps(name) + "\n" for name in new))


def _append_to_regular_file(path: Path, text: str) -> None:
    """Append to a file in one write; a link in its place is not followed: it raises OSError with ELOOP."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        os.write(handle, text.encode("utf-8"))
    finally:
        os.close(handle)


def _read_regular_file(path: Path) -> str:
    """Return the text of a regular file; a link, a pipe or a device raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 (a handle)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.ENXIO, "not a regular file", str(path))
        return file.read()


def _hash(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
