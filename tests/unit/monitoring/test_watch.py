"""`watch`: a training of another process, as a table in a terminal and as lines elsewhere, until it ends."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

import minisft
from minisft.errors import UserError
from minisft.files import hold_lock
from minisft.monitoring.run_watch import watch
from minisft.run_folder import RunFolder
from tests.command import refused, run
from tests.terminal import run_in_terminal

# Holds the lock of a run folder and writes steps, as a training does; `killed` ends it before its model is written.
TRAINING = """
import json, os, sys, time
from pathlib import Path
from minisft.files import hold_lock

root, ends, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with hold_lock(root / ".lock"):
    print("begun", flush=True)
    for step in range(1, 7):
        time.sleep(pause)
        line = dict(step=step, epoch=step / 3, loss=4.0 - step / 4, supervised_tokens=50, seconds=pause, peak_memory_mb=100)
        if step == 3:
            line["eval_loss"] = 3.5
        with (root / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\\n")
        if ends == "killed" and step == 4:
            os._exit(9)
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
"""


@pytest.fixture
def root(run_folder):
    """Return a run folder with a recipe of 6 steps, prepared data and nothing trained."""
    import shutil

    for name in ("model", "checkpoints", "evaluation"):
        shutil.rmtree(run_folder / name)
    (run_folder / "metrics.jsonl").unlink()
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 4", "max_steps: 6"))
    return run_folder


def start(root, ends="trained", pause=0.3):
    command = [sys.executable, "-c", TRAINING, str(root), ends, str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def step(number, **more):
    return json.dumps({"step": number, "epoch": number / 3, "loss": 4.0 - number / 4, "supervised_tokens": 50,
                       "seconds": 0.5, "peak_memory_mb": 100, **more}) + "\n"  # fmt: skip


def test_a_table_in_a_terminal_until_the_training_ends(root):
    process = start(root)
    session = run_in_terminal(["-m", "minisft", "watch", root])
    assert process.wait(60) == 0
    assert session.status == 0
    assert session.raw.count(b"\x1b[?25l") == session.raw.count(b"\x1b[?25h")
    rows = [row.split()[0] for row in session.last.splitlines()]
    assert rows[:9] == ["training", "step", "epoch", "loss", "held-out", "speed", "memory", "left", "trained:"]
    steps = [
        int(number) for screen in session.screens for number in re.findall(r"^step +(\d) of 6 ", screen, re.MULTILINE)
    ]
    assert steps == sorted(steps)  # a busy machine draws few of the six
    assert steps[-1] == 6
    assert steps[-1] == 6
    assert "loss 3.5000 at step 3" in session.last


def test_a_line_for_each_step_in_a_pipe(root):
    (root / "metrics.jsonl").write_text(step(1) + step(2))
    lines: list[str] = []
    waits: list[float] = []

    def sleep(seconds):
        waits.append(seconds)
        number = len(waits) + 2
        with (root / "metrics.jsonl").open("a") as file:
            file.write(
                step(number, eval_loss=3.5) if number == 3 else step(number)[:20] if number == 5 else step(number)
            )
        if number == 4:
            (root / "model").mkdir()
            (root / "model" / "config.json").write_text("{}")

    import minisft.monitoring.run_watch as module

    with hold_lock(root / ".lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "say", lines.append)

        def sleep_and_release(seconds):
            sleep(seconds)
            if len(waits) == 2:
                patch.setattr(module, "is_at_work", lambda run: False)

        assert watch(root, sleep=sleep_and_release)
    assert [line.split()[1] for line in lines[:-1]] == ["2/6", "3/6", "4/6"]
    assert lines[1].endswith("held-out loss 3.5000")
    assert lines[-1] == f"trained: {root / 'model'}"


def test_a_killed_training_is_named_with_the_command_to_go_on(root, capsys):
    process = start(root, ends="killed")
    (root / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    found = run(capsys, "watch", root)
    assert process.wait(60) == 9
    assert found.status == 1
    assert found.out.splitlines()[-1].startswith("step 4/6  epoch 1.33  loss 3.0000")
    assert "ended at step 4 of 6 without finishing" in found.err
    assert "checkpoint-2 is complete" in found.err
    assert f"minisft train {root / 'recipe.yaml'} --resume" in found.err


def test_a_trained_run_ends_at_once(run_folder, capsys):
    found = run(capsys, "watch", run_folder)
    assert found.status == 0
    assert found.out.splitlines()[-1] == f"trained: {run_folder / 'model'}"
    assert len(found.out.splitlines()) == 2  # and its newest step
    assert minisft.watch(run_folder)


def test_a_training_on_a_machine_whose_lock_is_not_seen_counts_by_its_changes(root):
    now = [(root / "recipe.yaml").stat().st_mtime + 1000.0]
    (root / "metrics.jsonl").write_text(step(1))
    os.utime(root / "metrics.jsonl", (now[0], now[0]))
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        now[0] += 10

    assert not watch(root, sleep=sleep, clock=lambda: now[0])
    assert 6 <= len(waited) <= 8  # a minute without a change


def test_a_run_that_nobody_trains_is_waited_for_and_then_refused(root):
    now = [0.0]

    def sleep(seconds):
        now[0] += 10

    with pytest.raises(UserError, match="no training is running here"):
        watch(root, sleep=sleep, clock=lambda: now[0])
    assert now[0] >= 60


def test_the_steps_of_a_resumed_or_replaced_run_are_shown_once(root, capsys):
    (root / "metrics.jsonl").write_text(step(1) + step(2))
    texts = [step(1) + step(2) + step(3), step(1) + step(2) + step(3, loss=9.0), None]

    def sleep(seconds):
        text = texts.pop(0)
        if text is None:
            (root / "model").mkdir()
            (root / "model" / "config.json").write_text("{}")
        else:
            (root / "new").write_text(text)
            (root / "new").replace(root / "metrics.jsonl")

    assert watch(root, sleep=sleep)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[:-1]] == ["2/6", "3/6", "3/6"]
    assert "loss 9.0000" in printed[2]


def test_ctrl_c_ends_it_quietly_and_not_the_training(root):
    process = start(root, pause=0.7)
    interrupted: list[int] = []

    def interrupt(screen, watching):
        if not interrupted and re.search(r"^left +\d+ s", screen, re.MULTILINE):
            interrupted.append(watching)  # once: a second signal would kill it while Python shuts down
            os.kill(watching, signal.SIGINT)

    session = run_in_terminal(["-m", "minisft", "watch", root], on_screen=interrupt)
    assert session.status == 0
    assert "Traceback" not in session.last
    assert "minisft:" not in session.last
    assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.parametrize("words", [["nothing-here"], [], ["a", "b"]])
def test_what_is_no_run_is_refused(words, capsys):
    refused(capsys, "watch", *words)


def test_damaged_lines_are_left_out(root, capsys):
    (root / "metrics.jsonl").write_bytes(
        step(1).encode()
        + b'{"step": 2}\n\xff\xfe\n[1]\n{"step": "3", "loss": 1}\n'
        + b"[" * 100_000
        + b"\n"
        + step(4).encode()
    )
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    assert RunFolder(root).is_trained()
    assert run(capsys, "watch", root).out.startswith("step 4/6")
