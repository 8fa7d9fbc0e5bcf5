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

from minisft.runs import RunFolder, load_run
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
    return "minisft.training.worker" in process.cmdline()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
