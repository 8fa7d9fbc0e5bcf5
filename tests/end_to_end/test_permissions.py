"""Files of checkpoints, of model/ and of an export have the permissions that the user's umask grants."""

import os

import pytest

from minisft.cli import main


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_follow_the_umask(recipe_file, tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        assert main(["train", str(recipe_file), "training.max_steps=1"]) == 0
        run, exported = tmp_path / "run", tmp_path / "exported"
        assert main(["export", str(run), str(exported), "--dtype", "bf16"]) == 0
    finally:
        os.umask(before)
    files = [
        path
        for folder in (run / "checkpoints", run / "model", exported)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert len(files) > 10
    assert {
        path.name: oct(path.stat().st_mode & 0o777) for path in files if path.stat().st_mode & 0o777 != expected
    } == {}
