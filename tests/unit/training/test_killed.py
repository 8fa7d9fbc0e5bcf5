"""What the kernel says of a killed process: its log and the counts of control groups, version 1 and 2."""

import time
from pathlib import Path

import pytest

from minisft.errors import UserError, WorkerError
from minisft.training.distributed import OutOfMemoryEvidence, killed_worker_error


@pytest.fixture
def events(tmp_path):
    """The counts of a control group of version 2 that this process has under `tmp_path`; the test writes them."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line for line in lines if line.startswith("0::")), None)
    if own is None:
        pytest.skip("no control groups of version 2 here")
    folder = tmp_path / own.removeprefix("0::").lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "memory.events"


@pytest.fixture
def kills(tmp_path, events):
    """What is known from now on, from the groups under `tmp_path` and the log `tmp_path/kmsg`, which is not there yet."""
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    return OutOfMemoryEvidence(groups=tmp_path, log=tmp_path / "kmsg")


def test_a_count_that_grew_is_evidence(kills, events):
    assert kills.evidence(1) is None
    events.write_text("low 0\noom 4\noom_kill 3\noom_group_kill 0\n")
    assert "memory limit" in str(kills.evidence(1))
    error = killed_worker_error(1, 2, "SIGKILL", 7, kills)
    assert isinstance(error, UserError)
    assert error.where == "rank 1 of 2 processes"


def test_without_evidence_memory_is_only_likely(kills):
    error = killed_worker_error(0, 1, "SIGKILL", 7, kills)
    assert isinstance(error, WorkerError)
    assert "rank 0 of 1 process was killed (SIGKILL)" in str(error)
    assert "likely" in str(error)


def test_the_kernels_log_names_the_process(kills, tmp_path):
    now = int(time.monotonic() * 1e6)
    lines = [
        f"6,1,{now - 10**9},-;Out of memory: Killed process 7 (python) before",
        f"6,2,{now + 10**6},-;a device",
        " DEVICE=+pci:0000:00:1f.2",
        *(f"6,3,{now + 10**6},-;a line of many, which one read does not give" for _ in range(300)),
        f"3,4,{now + 10**6},-;Out of memory: Killed process 7 (python), UID 0",
    ]
    (tmp_path / "kmsg").write_text("".join(f"{line}\n" for line in lines))
    assert kills.evidence(7) == "Out of memory: Killed process 7 (python), UID 0"
    assert kills.evidence(8) is None


def test_another_signal_is_named(kills):
    assert "was ended by SIGSEGV" in str(killed_worker_error(3, 4, "SIGSEGV", 7, kills))
