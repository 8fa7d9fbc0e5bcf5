"""`minisft check` as a user starts it, with processes of its own."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny import heed_ctrl_c, minisft


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="vanilla"),
        pytest.param(["training.strategy=zero2", "training.processes=2"], id="zero2"),
        pytest.param(["training.strategy=zero3", "training.processes=2"], id="zero3"),
        pytest.param(["training.processes=2", "training.packing=true"], id="vanilla-packed"),
    ],
)
def test_every_check_passes_under_every_strategy(recipe_file, overrides):
    done = minisft("check", recipe_file, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED " not in done.stdout
    assert "DeepSpeed" not in done.stdout + done.stderr  # which would spoil the table, and `--json` altogether
    assert "Warning" not in done.stderr
    run = recipe_file.parent / "run"
    written = json.loads((run / "check.json").read_text(encoding="utf-8"))
    assert {one["status"] for one in written["checks"] if not one["name"].startswith("spend.")} == {"ok"}
    assert not (run / ".check").exists()
    assert not (run / "checkpoints").exists()  # nothing of the check's own steps is taken for the run's


@pytest.mark.long
def test_a_process_that_fails_is_a_failure_with_its_own_words(recipe_file):
    """The loss of the first step is no number, which only the process that trains finds out."""
    done = minisft("check", recipe_file, "training.learning_rate=1.0e+30", "training.processes=2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "strategy.steps: " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "checkpoint.plain" in done.stdout
    assert "because strategy.steps failed" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_check_that_is_stopped_in_its_steps_leaves_nothing(recipe_file, number):
    command = [sys.executable, "-m", "minisft", "check", str(recipe_file)]
    run = recipe_file.parent / "run"
    check = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    try:
        _wait_until((run / ".check" / "steps" / "tensorboard").exists)  # its process is there
        check.send_signal(number)
        _, errors = check.communicate(timeout=120)
    finally:
        check.kill()
    assert check.returncode == 1, errors
    assert "stopped as asked" in errors
    assert not (run / ".check").exists()
    assert not (run / "check.json").exists()


def _wait_until(there):
    end = time.monotonic() + 180
    while not there():
        assert time.monotonic() < end, "the steps did not begin"
        time.sleep(0.05)
