"""Joining a launch under way, and what becomes of workers whose launcher or fellow dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from minisft.cli import main
from minisft.run_folder import RunFolder, load_run
from tests.tiny import minisft, write_recipe

SPLIT = ("training.batch_size=4",)


def losses(output):
    return [json.loads(line)["loss"] for line in RunFolder(output).metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model, conversations):
    folder = tmp_path_factory.mktemp("launch")
    settings = "{epochs: 1, learning_rate: 1.0e-3, precision: fp32}"
    recipe = write_recipe(folder, tiny_model, conversations, settings)
    assert minisft("train", recipe).returncode == 0
    return recipe, losses(folder / "run")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["vanilla", "zero2"])
def test_torchrun_is_joined(alone, tmp_path, strategy):
    recipe, expected = alone
    words = ["train", recipe, f"output={tmp_path / 'run'}", f"training.strategy={strategy}", *SPLIT]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run([*command, "-m", "minisft", *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-5)
    assert load_run(tmp_path / "run").training.processes == 2


@pytest.mark.long
def test_slurm_is_joined(alone, tmp_path):
    recipe, expected = alone
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho elsewhere\n")
    (tmp_path / "scontrol").chmod(0o755)
    port = free_port()
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank), "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        words = ["train", recipe, f"output={tmp_path / 'run'}", *SPLIT]
        command = [sys.executable, "-m", "minisft", *map(str, words)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-5)


def test_no_worker_outlives_its_launcher(alone, tmp_path):
    """SIGKILL of the launcher alone: its workers, in sessions of their own, must not train on."""
    process, workers = start_two(alone[0], tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


@pytest.mark.long
def test_a_dead_worker_ends_the_job(alone, tmp_path):
    process, workers = start_two(alone[0], tmp_path / "run")
    workers[0].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a training process failed" in said
    assert not psutil.wait_procs(workers, timeout=5)[1]


DIES = """
import os, signal, sys

def watch(event, arguments):
    if event == "import" and arguments[0] == "minisft.training.trainer":
        {action}

if os.environ.get("RANK") == "1":
    sys.addaudithook(watch)
"""


@pytest.fixture
def rank_1(recipe_file, tmp_path, monkeypatch, capfd):
    """Train on two processes, of which rank 1 does something before its first step; return what is printed."""

    def train_and(action):
        (tmp_path / "sitecustomize.py").write_text(DIES.format(action=action))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        status = main(["train", str(recipe_file), "training.processes=2", "training.batch_size=4"])
        return status, capfd.readouterr().err

    return train_and


def test_a_killed_worker_is_named_with_the_likely_reason(rank_1):
    status, said = rank_1("os.kill(os.getpid(), signal.SIGKILL)")
    assert status == 1
    assert "a training process failed: rank 1 of 2 processes was killed (SIGKILL)" in said
    assert "memory is the likely reason" in said
    assert "Traceback" not in said
    assert "pytorch.org" not in said


@pytest.mark.long
def test_the_message_of_the_kernel_about_memory_is_printed(rank_1, monkeypatch):
    words = "Out of memory: Killed process 7 (python)"
    monkeypatch.setattr("minisft.training.distributed.OutOfMemoryEvidence.evidence", lambda kills, pid: words)
    status, said = rank_1("os.kill(os.getpid(), signal.SIGKILL)")
    assert status == 2
    assert f"the kernel killed it (SIGKILL), since memory ran out: {words}" in said
    assert "Fix: give it more memory" in said


@pytest.mark.long
def test_a_worker_that_fails_shows_its_own_traceback_once(rank_1):
    status, said = rank_1("raise RuntimeError('the disk of rank 1 is on fire')")
    assert status == 1
    assert said.count("RuntimeError: the disk of rank 1 is on fire") == 1
    assert said.count("Traceback") == 1
    assert "rank 1 of 2 with exit status 1" in said
    assert "pytorch.org" not in said


def start_two(recipe, output):
    """Start a long run on two processes; return the launcher and its workers once they train."""
    words = ["train", recipe, f"output={output}", "training.processes=2", "training.epochs=500", *SPLIT]
    command = [sys.executable, "-m", "minisft", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not RunFolder(output).metrics.exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if is_worker(child)]
    assert len(workers) == 2
    return process, workers


def is_worker(process):
    return "minisft.training_worker" in process.cmdline()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
