"""The table of trials in terminals of several sizes."""

import io

import pytest
from rich.console import Console

from minisft.search.progress import TrialTable


def entry(number, state="running", **more):
    return {"number": number, "settings": {"training.learning_rate": 10.0**-number, "training.epochs": 2}, "state": state,
            "rungs": [], "objective": None, "low": None, "high": None, **more}  # fmt: skip


def lines(table, width=100, height=24):
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, color_system=None)
    console.print(table)
    return file.getvalue().splitlines()


def test_a_trial_has_its_settings_rung_loss_and_state():
    rungs = {"rungs": [{"fraction": 0.125}], "objective": 1.25, "low": 1.0, "high": 1.5}
    trials = [entry(0, "pruned", **rungs), entry(1), entry(2, "failed")]
    shown = lines(TrialTable(trials, "loss", {1: "step 3 of 9"}))
    assert "loss, 95 % interval" in shown[0]
    assert "learning_rate 1.0, epochs 2" in shown[1]
    assert "0.125" in shown[1]
    assert "1.2500 [1.0000, 1.5000]  pruned" in shown[1]
    assert "step 3 of 9" in shown[2]
    assert "failed" in shown[3]
    assert "1.2500 [1.0000, 1.5000]  pruned" in lines(TrialTable(trials, "loss", {}), width=60)[1]
    assert "BLEU, 95 % interval" in lines(TrialTable(trials, "bleu", {}))[0]


@pytest.mark.parametrize(("width", "height"), [(100, 24), (40, 24), (100, 10), (20, 5)])
def test_the_table_fits_into_the_terminal(width, height):
    states = ["pruned", "failed", "running"]
    shown = lines(TrialTable([entry(n, states[n % 3]) for n in range(30)], "loss", {}), width, height)
    assert len(shown) <= height - 2  # below it are what is being waited for and the cursor
    assert all(len(line) <= width for line in shown)
    assert shown[-1][:13] == f"and {30 - (height - 4)} trials that are not shown here"[:13]
    assert "running" in "".join(shown) or width < 50


def test_the_trials_that_go_on_are_shown_before_those_that_were_stopped():
    trials = [entry(0, "complete"), *(entry(n, "pruned") for n in range(1, 20)), entry(20)]
    numbers = [line.split()[0] for line in lines(TrialTable(trials, "loss", {}), height=8)[1:-1]]
    assert numbers == ["0", "18", "19", "20"]
