"""What a file system refuses is told apart from other errors, in every library that writes a checkpoint."""

import contextlib
import errno
import json
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minisft.errors import UserError
from minisft.training.checkpoints import WriteErrors, explain_failed_writes

TENSOR = torch.zeros(50_000)
FULL = Path("/dev/full")  # every write to it finds no space


@contextlib.contextmanager
def small_files_only():
    """No file may grow past 10,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def copy_a_large_file(folder):
    (folder / "from").mkdir(exist_ok=True)
    with (folder / "from" / "file").open("wb") as file:
        file.truncate(10_000)  # a hole: nothing is written yet
    shutil.copytree(folder / "from", folder / "to")
    (folder / "to" / "file").write_bytes(bytes(20_000))


WRITES = {
    "safetensors": lambda folder: save_file({"weight": TENSOR}, folder / "file"),
    "torch": lambda folder: torch.save({"weight": TENSOR}, folder / "file"),
    "torch, as DeepSpeed": lambda folder: torch.save(TENSOR, folder / "file", _use_new_zipfile_serialization=False),
    "python": lambda folder: (folder / "file").write_text(json.dumps([0] * 20_000)),
    "a copied folder": copy_a_large_file,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_refused_write_is_noted(tmp_path, name):
    attempt = WriteErrors()
    with small_files_only():
        assert attempt(WRITES[name], tmp_path) is None
    assert attempt.failure in ("File too large", "torch.save could not write all of it")


@pytest.mark.parametrize("write", [lambda: torch.save(TENSOR, str(FULL)), lambda: FULL.write_text("a" * 99_999)])
def test_a_full_disk_is_named(tmp_path, write):
    (tmp_path / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    with (
        pytest.raises(UserError, match="the checkpoints written before are complete") as caught,
        explain_failed_writes(tmp_path),
    ):
        write()
    assert "--resume" in caught.value.fix
    assert "the last of them checkpoint-4" in caught.value.problem


def test_a_full_disk_before_the_first_checkpoint_claims_none(tmp_path):
    with pytest.raises(UserError, match="no checkpoint was written yet") as caught, explain_failed_writes(tmp_path):
        FULL.write_text("a" * 99_999)
    assert "are complete" not in caught.value.problem


def test_after_a_refused_write_no_other_is_tried():
    attempt = WriteErrors()
    written: list[Any] = []

    def refuse():
        raise OSError(errno.ENOSPC, "No space left on device")

    attempt(written.append, 1)
    attempt(refuse)
    attempt(written.append, 2)
    assert written == [1]
    assert attempt.failure == "No space left on device"


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), RuntimeError("CUDA error"), ValueError("x")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        WriteErrors()(fail)
    with pytest.raises(type(error)), explain_failed_writes(tmp_path):
        fail()


@pytest.mark.parametrize(("error", "told"), [(OSError(errno.ENOSPC, "full"), False), (ValueError("x"), True)])
def test_a_refused_write_of_a_thread_is_reported_once_by_the_main_thread(tmp_path, monkeypatch, error, told):
    died: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", died.append)

    def fail():
        raise error

    with explain_failed_writes(tmp_path):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert bool(died) == told
    assert threading.excepthook == died.append
