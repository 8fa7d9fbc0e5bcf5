"""SIGTERM and Ctrl-C: a checkpoint at the end of the step, a clean end, and the same bits after --resume."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from minisft.run_folder import RunFolder
from tests.tiny import heed_ctrl_c, minisft, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, conversations):
    settings = "{epochs: 40, learning_rate: 1.0e-3, precision: fp32, save_every: 1000}"
    return write_recipe(tmp_path_factory.mktemp("stop"), tiny_model, conversations, settings)


@pytest.mark.parametrize(
    ("strategy", "processes", "number"),
    [
        ("vanilla", 1, signal.SIGTERM),
        ("vanilla", 1, signal.SIGUSR1),  # what a scheduler is told to send before it ends a job
        pytest.param("vanilla", 2, signal.SIGINT, marks=pytest.mark.long),
        pytest.param("zero2", 2, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("zero3", 2, signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_is_saved_and_resumes_to_the_same_bits(recipe, tmp_path, strategy, processes, number):
    how = [f"training.strategy={strategy}", f"training.processes={processes}", f"training.batch_size={8 // processes}"]
    whole = RunFolder(tmp_path / "whole")
    assert minisft("train", recipe, f"output={whole.root}", *how).returncode == 0
    run = RunFolder(tmp_path / "run")
    process = start(recipe, run, how)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    [checkpoint] = run.list_checkpoints()
    assert f"{signal.Signals(number).name}: stopping after this step" in said
    assert f"minisft: stopped as asked; {checkpoint} holds the complete state, and --resume continues" in said
    assert not run.is_trained()
    done = minisft("train", recipe, f"output={run.root}", *how, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resuming from {checkpoint}" in done.stdout
    assert weights(run) == weights(whole)


def test_a_second_signal_stops_at_once(recipe, tmp_path):
    run = RunFolder(tmp_path / "run")
    process = start(recipe, run, ["training.epochs=100000"])
    os.kill(process.pid, signal.SIGSTOP)  # both are there when it goes on
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.strip().endswith("minisft: stopped")
    assert not run.list_checkpoints()


def test_a_signal_of_the_scheduler_and_its_sigterm_are_one_request(recipe, tmp_path):
    run = RunFolder(tmp_path / "run")
    process = start(recipe, run, ["training.epochs=100000"])
    os.kill(process.pid, signal.SIGSTOP)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "holds the complete state, and --resume continues" in said
    assert len(run.list_checkpoints()) == 1


@pytest.mark.long
def test_a_sigterm_to_all_processes_of_a_run_is_one_request(recipe, tmp_path):
    """As SLURM sends it under proctrack/linuxproc: to the launcher and its workers, and once more through srun."""
    run = RunFolder(tmp_path / "run")
    process = start(recipe, run, ["training.epochs=100000", "training.processes=2", "training.batch_size=4"])
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(everyone) >= 3
    for one in (*everyone, everyone[0]):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "holds the complete state, and --resume continues" in said
    assert len(run.list_checkpoints()) == 1


@pytest.mark.long
def test_a_sigterm_to_one_worker_ends_the_run(recipe, tmp_path):
    run = RunFolder(tmp_path / "run")
    process = start(recipe, run, ["training.epochs=100000", "training.processes=2", "training.batch_size=4"])
    worker = next(one for one in psutil.Process(process.pid).children(recursive=True)
                  if "minisft.training_worker" in one.cmdline())  # fmt: skip
    worker.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "minisft: a training process failed: rank " in said
    assert not worker.is_running()


def start(recipe, run, how):
    """Start a run; return its process once it has taken a step."""
    words = ["train", recipe, f"output={run.root}", *how]
    command = [sys.executable, "-m", "minisft", *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=heed_ctrl_c, **pipes)
    while not run.metrics.exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


def weights(run):
    return (run.model / "model.safetensors").read_bytes()
