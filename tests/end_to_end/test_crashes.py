"""SIGKILL at any moment, in the middle of writing a checkpoint too: what --resume makes of it has the same bits.

Each case crashes the same run several times in turn, so that one undisturbed run and one end serve all its moments.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from minisft.run_folder import RunFolder
from tests.tiny import minisft, write_recipe

SETTINGS = "{epochs: 15, learning_rate: 1.0e-3, precision: fp32, save_every: 3}"  # 60 steps
LORA = "training.lora={rank: 4, dropout: 0.1}"
# Put on PYTHONPATH, every process of a run imports it: the one of rank 0 kills itself and its launcher at the
# so-manieth event of a kind (one of Python's audit events) that concerns a file of a name.
CRASHING = """
import os, signal, sys
wanted, name, count = os.environ.get("CRASH_AT", "  0").split(" ")
seen = 0

def watch(event, arguments):
    global seen
    if event != wanted or "/checkpoints/" not in str(arguments[0]) or not str(arguments[0]).endswith(name):
        return
    if event == "open" and "w" not in str(arguments[1]):
        return
    seen += 1
    if seen == int(count):
        if "MINISFT_LAUNCHER" in os.environ:
            os.kill(int(os.environ["MINISFT_LAUNCHER"]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

if wanted and os.environ.get("RANK", "0") == "0":
    sys.addaudithook(watch)
"""
# Each, but the last, in the second checkpoint that a process writes; STEP is its step.
MID_WRITE = [
    "os.mkdir /.unfinished/checkpoint-STEP 1",  # nothing is there
    "open /tokenizer_config.json 2",  # the model is written
    "open /trainer_state.json 2",  # the states too
    "os.rename /.unfinished/checkpoint-STEP 1",  # all is written, and has no name
    "shutil.rmtree /.unfinished 3",  # it has its name; one is at the start
    "os.remove /STATE 1",  # the first has its name, and those before lose their states
]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, conversations):
    return write_recipe(tmp_path_factory.mktemp("crashes"), tiny_model, conversations, SETTINGS)


@pytest.mark.parametrize(
    ("strategy", "processes", "more"),
    [
        ("vanilla", 1, []),
        ("zero2", 2, []),
        ("zero3", 2, []),
        ("vanilla", 1, [LORA]),
    ],
    ids=["vanilla", "zero2", "zero3", "lora"],
)
def test_crashes_cost_nothing_in_the_result(recipe, tmp_path, strategy, processes, more):
    how = [
        f"training.strategy={strategy}", f"training.processes={processes}", f"training.batch_size={8 // processes}",
        *more,
    ]  # fmt: skip
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    assert minisft("train", recipe, f"output={whole.root}", *how).returncode == 0
    words = ["train", recipe, f"output={run.root}", *how]
    (tmp_path / "sitecustomize.py").write_text(CRASHING)
    for moment in MID_WRITE:
        crash_inside(
            words, run, tmp_path, moment.replace("STATE", "optimizer.pt" if strategy == "vanilla" else "latest")
        )
    for kill in (kill_all, kill_launcher, kill_worker) if processes > 1 else (kill_all,):
        crash_from_outside(words, run, kill)
    assert not run.is_trained(), "it ended before all crashes came"
    done = minisft(*words, "--resume")
    assert done.returncode == 0, done.stderr
    assert steps_and_losses(run) == steps_and_losses(whole)
    assert weights(run) == weights(whole)
    left = {path.name for path in run.checkpoints.iterdir()} - {path.name for path in run.list_checkpoints()}
    assert not left


def crash_inside(words, run, hook, moment):
    there = newest(run)
    step = there + 6
    path = os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])
    died = minisft(*words, *resume(run), CRASH_AT=moment.replace("STEP", str(step)), PYTHONPATH=path)
    assert died.returncode == -signal.SIGKILL, (moment, died.stderr)
    assert newest(run) == (step if moment.startswith("shutil.rmtree") else there + 3), moment


def crash_from_outside(words, run, kill):
    there = newest(run)
    command = [sys.executable, "-m", "minisft", *map(str, words), "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while newest(run) == there:
        assert process.poll() is None
        time.sleep(0.003)
    workers = psutil.Process(process.pid).children(recursive=True)
    kill(process, [worker for worker in workers if "minisft.training_worker" in worker.cmdline()])
    process.wait(timeout=30)
    assert not psutil.wait_procs(workers, timeout=30)[1], "a worker lives on"


def kill_all(process, workers):
    for one in (process, *workers):
        one.kill()


def kill_launcher(process, workers):
    process.kill()


def kill_worker(process, workers):
    workers[-1].kill()


def resume(run):
    return ["--resume"] if run.has_begun() else []


def newest(run):
    return max((int(path.name.removeprefix("checkpoint-")) for path in run.list_checkpoints()), default=0)


def steps_and_losses(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def weights(run):
    [path] = Path(run.model).glob("*.safetensors")
    return path.read_bytes()
