"""Paths as users write them, and locks on file systems that have none."""

import errno
import fcntl
from pathlib import Path

import pytest

from minisft.errors import UserError
from minisft.files import expand_user_path, hold_lock


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


def test_a_file_system_without_locks_is_named(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="cannot lock files") as refused, hold_lock(tmp_path / ".lock"):
        pass
    assert refused.value.where == str(tmp_path)
