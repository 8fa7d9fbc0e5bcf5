"""Hashes that are kept: found without reading a byte, and never for a file that changed."""

import hashlib
import os
import sys

import pytest

from minisft.files import cache_folder
from minisft.hash_cache import hash_files_once
from minisft.models import weights_fingerprint

opened: list[str] = []
watching = False


def _note(event, arguments):
    if watching and event == "open":
        opened.append(str(arguments[0]))


sys.addaudithook(_note)  # it cannot be removed again


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    for number, path in enumerate(paths):
        path.write_bytes(b"weights %d" % number)
    return paths


def expected_of(paths):
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in paths)).hexdigest()


def hash_and_watch(paths):
    """Return the hash, and the files among `paths` that were opened for it."""
    global watching
    opened.clear()
    watching = True
    try:
        found = hash_files_once(paths, settled=0.0)
    finally:
        watching = False
    return found, [path for path in paths if str(path) in opened]


def test_the_second_time_no_byte_is_read(files):
    assert hash_and_watch(files) == (expected_of(files), files)
    assert hash_and_watch(files) == (expected_of(files), [])


def test_other_files_have_a_hash_of_their_own(files):
    hash_and_watch(files)
    assert hash_and_watch(files[:1]) == (expected_of(files[:1]), files[:1])
    assert hash_and_watch(files[::-1]) == (expected_of(files[::-1]), files[::-1])


@pytest.mark.parametrize("hidden", [False, True])
def test_a_file_of_the_same_size_that_changed_is_read_again(files, hidden):
    """A time of modification that was set back hides nothing."""
    hash_and_watch(files)
    before = files[1].stat()
    files[1].write_bytes(b"WEIGHTS 1")
    if hidden:
        os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files[1].stat().st_size == before.st_size
    assert hash_and_watch(files) == (expected_of(files), files)


def test_a_file_that_was_replaced_by_a_rename_is_read_again(files, tmp_path):
    hash_and_watch(files)
    other = tmp_path / "other"
    other.write_bytes(b"WEIGHTS 1")
    before = files[1].stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(files[1])
    assert hash_and_watch(files) == (expected_of(files), files)


def test_a_file_that_has_just_changed_is_not_trusted(files):
    assert hash_files_once(files) == hash_files_once(files) == expected_of(files)
    assert not (cache_folder() / "hashes").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"files": 1}', b"[" * 100_000])
def test_a_damaged_cache_does_no_harm(files, damage):
    hash_and_watch(files)
    [entry] = (cache_folder() / "hashes").iterdir()
    entry.write_bytes(damage)
    assert hash_and_watch(files) == (expected_of(files), files)
    assert hash_and_watch(files) == (expected_of(files), [])


def test_a_cache_that_cannot_be_written_does_no_harm(files, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "file"))
    assert hash_and_watch(files) == (expected_of(files), files)
    assert hash_and_watch(files) == (expected_of(files), files)


def test_a_model_can_be_hashed_by_its_bytes(files, tmp_path, monkeypatch):
    """As `minisft verify` does: a hash in the cache that is wrong is not believed."""
    monkeypatch.setattr("minisft.hash_cache._SETTLED", 0.0)
    right = hash_files_once(files, settled=0.0)
    [entry] = (cache_folder() / "hashes").iterdir()
    entry.write_text(entry.read_text().replace(right, "0" * 64))
    assert weights_fingerprint(tmp_path) == "0" * 64
    assert weights_fingerprint(tmp_path, read_again=True) == right
