"""What the kernel says of a killed process: its log and the counts of control groups, version 1 and 2."""

import os
import time

import pytest

from minisft.errors import UserError, WorkerError
from minisft.training import distributed
from minisft.training.distributed import OutOfMemoryEvidence, killed_worker_error


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Give this process a control group of version 2 whose count the test sets; and no kernel log."""
    own = next((line for line in open("/proc/self/cgroup").read().splitlines() if line.startswith("0::")), None)  # noqa: PTH123, SIM115
    if own is None:
        pytest.skip("no control groups of version 2 here")
    folder = tmp_path / own.removeprefix("0::").lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(distributed, "_CGROUPS", tmp_path)
    monkeypatch.setattr(distributed, "_LOG", tmp_path / "none")
    return folder / "memory.events"


def test_a_count_that_grew_is_evidence(groups):
    groups.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    kills = OutOfMemoryEvidence()
    assert kills.evidence(1) is None
    groups.write_text("low 0\noom 4\noom_kill 3\noom_group_kill 0\n")
    assert "memory limit" in str(kills.evidence(1))
    error = killed_worker_error(1, 2, "SIGKILL", 7, kills)
    assert isinstance(error, UserError)
    assert error.where == "rank 1 of 2 processes"


def test_without_evidence_memory_is_only_likely(groups):
    error = killed_worker_error(0, 1, "SIGKILL", 7, OutOfMemoryEvidence())
    assert isinstance(error, WorkerError)
    assert "rank 0 of 1 process was killed (SIGKILL)" in str(error)
    assert "likely" in str(error)


def test_the_kernels_log_names_the_process(groups, monkeypatch):
    kills = OutOfMemoryEvidence()
    now = int(time.monotonic() * 1e6)
    lines = [
        f"6,1,{now - 10**9},-;Out of memory: Killed process 7 (python) before",
        f"3,2,{now + 10**6},-;Out of memory: Killed process 7 (python), UID 0",
    ]
    read, write = os.pipe()
    records = iter([*(line.encode() for line in lines), OSError()])

    def next_record(file, size):
        record = next(records)
        if isinstance(record, OSError):
            raise record
        return record

    monkeypatch.setattr(distributed.os, "open", lambda path, flags: read)
    monkeypatch.setattr(distributed.os, "read", next_record)
    assert kills.evidence(7) == "Out of memory: Killed process 7 (python), UID 0"
    os.close(write)


def test_another_signal_is_named(groups):
    assert "died of SIGSEGV" in str(killed_worker_error(3, 4, "SIGSEGV", 7, OutOfMemoryEvidence()))
