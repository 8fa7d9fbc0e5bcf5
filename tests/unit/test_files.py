"""Paths as users write them, and locks on file systems that have none."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import psutil
import pytest

from minisft.errors import UserError
from minisft.files import expand_user_path, hold_lock, is_lock_held


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user_path("~") == tmp_path
    assert expand_user_path("~/runs/a") == tmp_path / "runs" / "a"


@pytest.mark.parametrize("text", ["runs/a", "/runs/a", ".", "a/~/b", "a b"])
def test_other_paths_stay(text):
    assert expand_user_path(text) == Path(text)


def test_a_name_that_begins_with_a_tilde_is_never_expanded_again():
    assert expand_user_path("./~/x") == Path.cwd() / "~" / "x"


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "empty"), (" \t", "empty"), ("a\0b", "NUL"), ("~no-such-user/x", "~no-such-user stands for a home folder")],
)
def test_what_is_no_path_is_refused(text, problem):
    with pytest.raises(UserError, match=problem) as refused:
        expand_user_path(text, "output")
    assert refused.value.where == "output"


# --- locks where the file system has none


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def lock(request, monkeypatch, tmp_path):
    """A lock file of a file system that refuses flock(2)."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return tmp_path / ".lock"


def write_holder(lock, **changes):
    holder = {"host": socket.gethostname(), "process": os.getpid(), "started": psutil.Process().create_time()}
    lock.touch()
    lock.with_name(".lock.held").write_text(json.dumps(holder | changes))


def test_a_second_process_is_refused_without_flock(lock):
    with hold_lock(lock):
        assert is_lock_held(lock)
        with pytest.raises(BlockingIOError), hold_lock(lock, patience=0.0):
            pass
    assert not is_lock_held(lock)
    with hold_lock(lock):
        pass
    assert [path.name for path in lock.parent.iterdir()] == [".lock"]


@pytest.mark.parametrize("gone", [{"process": 2**22 + 1}, {"started": 1.0}], ids=["ended", "its number is another's"])
def test_the_lock_of_a_killed_process_is_taken(lock, gone):
    write_holder(lock, **gone)
    assert not is_lock_held(lock)
    with hold_lock(lock):
        assert is_lock_held(lock)


def test_a_process_of_another_host_is_named(lock):
    write_holder(lock, host="gpu07", process=77)
    assert is_lock_held(lock)
    by = "process 77 on gpu07 is at work here, or was killed"
    with pytest.raises(UserError, match=by) as refused, hold_lock(lock, patience=0.0):
        pass
    assert refused.value.where == str(lock.parent)
    assert f"delete {lock}.held" in str(refused.value)


def test_a_lock_that_a_killed_process_did_not_finish_writing_is_named(lock):
    lock.touch()
    lock.with_name(".lock.held").touch()
    assert is_lock_held(lock)
    with pytest.raises(UserError, match="a process is at work here, or was killed"), hold_lock(lock, patience=0.0):
        pass


def test_another_error_of_flock_stays(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken disk"), hold_lock(tmp_path / ".lock"):
        pass
