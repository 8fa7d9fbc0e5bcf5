"""A disk that is too small, or that fills up: refused before, or stopped with earlier checkpoints whole."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from minisft.recipe import load_recipe
from minisft.run_folder import RunFolder
from minisft.training.disk import checkpoint_size
from tests.tiny import minisft, write_recipe

TOO_LITTLE = 60_000  # bytes: less than the weights, more than all else that training writes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, conversations):
    settings = "{epochs: 40, learning_rate: 1.0e-3, precision: fp32, save_every: 5}"
    return write_recipe(tmp_path_factory.mktemp("disk"), tiny_model, conversations, settings)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_run_that_does_not_fit_is_refused_before_it_starts(recipe, small_disk):
    run = RunFolder(small_disk / "run")
    refused = minisft("train", recipe, f"output={run.root}", "training.keep_optimizer=all")
    assert refused.returncode == 2
    assert "the run needs " in refused.stderr
    assert " are free there" in refused.stderr
    assert "training.keep_checkpoints" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not run.has_begun()


def test_a_refused_write_stops_the_run_and_leaves_no_half_checkpoint(recipe, tmp_path):
    run = RunFolder(tmp_path / "run")
    process = start(recipe, run, ["training.epochs=10000"])
    limit(process.pid)
    _, said = process.communicate(timeout=60)
    check_stopped(run, process.returncode, said)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["vanilla", "zero2", "zero3"])
@pytest.mark.parametrize("worker", [0, 1])
def test_one_process_that_cannot_write_stops_all(recipe, tmp_path, strategy, worker):
    if (strategy, worker) == ("vanilla", 1):
        pytest.skip("it writes nothing that large")
    run = RunFolder(tmp_path / "run")
    how = ["training.processes=2", f"training.strategy={strategy}", "training.batch_size=4"]
    process = start(recipe, run, [*how, "training.epochs=10000"])
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if rank_of(child) is not None]
    limit(next(child.pid for child in workers if rank_of(child) == str(worker)))
    _, said = process.communicate(timeout=60)
    check_stopped(run, process.returncode, said)
    assert not psutil.wait_procs(workers, timeout=5)[1]


@pytest.mark.long
def test_a_disk_that_fills_up(recipe, small_disk, tmp_path):
    """Another program takes the room that was there when the run began; freed, the run ends in the same bits."""
    how = ["training.keep_checkpoints=2"]
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(small_disk / "run")
    assert minisft("train", recipe, f"output={whole.root}", *how).returncode == 0
    process = start(recipe, run, how)
    os.kill(process.pid, signal.SIGSTOP)
    fill(small_disk / "other")
    os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    check_stopped(run, process.returncode, said)
    assert "No space left on device" in said or "torch.save could not write" in said
    (small_disk / "other").unlink()
    done = minisft("train", recipe, f"output={run.root}", *how, "--resume")
    assert done.returncode == 0, done.stderr
    assert (run.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    assert [path.name for path in run.list_checkpoints()] == [path.name for path in whole.list_checkpoints()]


@pytest.mark.long
@pytest.mark.parametrize("lora", ["null", "{rank: 8}"])
@pytest.mark.parametrize("strategy", ["vanilla", "zero1", "zero2", "zero3"])
def test_what_was_computed_is_what_is_written(recipe, tiny_model, tmp_path, strategy, lora):
    """Up to what does not grow with the model, which is counted generously."""
    run = RunFolder(tmp_path / "run")
    how = [f"training.strategy={strategy}", f"training.lora={lora}", "training.max_steps=1"]
    if strategy != "vanilla":
        how += ["training.processes=2", "training.batch_size=4"]
    done = minisft("train", recipe, f"output={run.root}", *how)
    assert done.returncode == 0, done.stderr
    size = checkpoint_size(load_recipe(recipe, how), tiny_model)
    [checkpoint] = run.list_checkpoints()
    written = bytes_of(checkpoint)
    assert written - 20_000 < size.model + size.state < written + 160_000
    assert abs(bytes_of(run.model) - size.model) < 20_000


def test_preparing_warns_of_a_small_test_split(recipe, tmp_path):
    refused = with_small_files("prepare", recipe, f"output={tmp_path / 'run'}")
    check_refused(refused)
    done = minisft("prepare", recipe, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_evaluating_warns_of_a_small_test_split(recipe, tmp_path):
    run = RunFolder(tmp_path / "run")
    done = minisft("train", recipe, f"output={run.root}", "training.max_steps=2", "training.save_every=1")
    assert done.returncode == 0, done.stderr
    check_refused(with_small_files("evaluate", run.root))
    done = minisft("evaluate", run.root)
    assert done.returncode == 0, done.stderr


def with_small_files(*words):
    """Run the command line where no file may grow above 1,000 bytes."""
    return subprocess.run(
        [sys.executable, "-m", "minisft", *map(str, words)], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY)),
    )  # fmt: skip


def check_refused(done):
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def start(recipe, run, how):
    """Start a run; return its process once it has written a checkpoint."""
    words = ["train", recipe, f"output={run.root}", *how]
    command = [sys.executable, "-m", "minisft", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not run.list_checkpoints():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return process


def rank_of(process):
    return process.environ().get("RANK") if "minisft.training_worker" in process.cmdline() else None


def limit(pid):
    """Let no file of a process grow any more once it has `TOO_LITTLE` bytes."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (TOO_LITTLE, hard))


def fill(path):
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def check_stopped(run, status, said):
    assert status == 2, said
    assert "Traceback" not in said
    assert said.count("minisft: ") == 1
    assert "the checkpoints written before are complete" in said
    assert "--resume" in said
    assert run.list_checkpoints()
    left = {path.name for path in run.checkpoints.iterdir()} - {path.name for path in run.list_checkpoints()}
    assert not left
    assert (run.list_checkpoints()[-1] / "optimizer.pt").exists() or list(
        run.list_checkpoints()[-1].glob("global_step*/*optim_states.pt")
    )
    assert not run.is_trained()
