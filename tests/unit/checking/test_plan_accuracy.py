"""Predictions that are far off what was measured, and runs that do not fit: the check for it is the first to fail."""

from dataclasses import replace

import pytest

from minisft.checking import strategy_checks
from minisft.console import console, error_console
from minisft.planning import planner, prediction
from tests.unit.checking.examined import assert_first_to_fail, examined, steps_in_this_process


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    for one in (console, error_console):
        monkeypatch.setattr(one, "quiet", one.quiet)  # the steps set it
    monkeypatch.setattr(strategy_checks, "run_steps_in_child", steps_in_this_process)


def test_a_prediction_that_knows_nothing_of_the_process_itself(recipe_file, monkeypatch):
    """It is off by more than twice: a tiny model takes little beside Python and its libraries."""
    monkeypatch.setattr(prediction, "_PROCESS_BYTES", 0.0)
    detail = assert_first_to_fail(examined(recipe_file, only="spend.memory"), "spend.memory")
    assert "GB, the plan says 0." in detail


def test_a_run_that_does_not_fit(recipe_file, monkeypatch):
    """The steps of the check are small and fit; the run's do not."""

    def on_a_small_machine(recipe, own=planner.predict_here):
        made = own(recipe)
        return made if ".check" in recipe.output else replace(made, usable_bytes=made.process_bytes)

    monkeypatch.setattr(planner, "predict_here", on_a_small_machine)
    monkeypatch.setattr(strategy_checks, "MAX_RATIO", 1e9)  # what the tests before this one took counts here
    assert "the run needs" in assert_first_to_fail(examined(recipe_file, only="spend.memory"), "spend.memory")


def test_steps_that_take_far_longer_than_planned(recipe_file, monkeypatch):
    """As a tiny model's do, whose steps are hardly arithmetic, if short ones were not spared."""
    monkeypatch.setattr(strategy_checks, "SLOW", 0.0)
    monkeypatch.setattr(strategy_checks, "MAX_SLOWDOWN", 1e-3)
    results = examined(recipe_file, only="spend.time")
    assert "the plan says" in assert_first_to_fail(results, "spend.time")


def test_a_strategy_left_open_is_checked_as_the_plan_chooses_it(recipe_file):
    results = examined(recipe_file, "training.strategy=auto", only="strategy.steps")
    assert results["strategy.steps"].status == "ok"
    assert "under vanilla" in results["strategy.steps"].detail


def test_what_one_process_cannot_hold_is_no_failure(recipe_file, monkeypatch):
    """A model that fits under ZeRO alone: what compares with one process is not run, with the reason."""
    import torch

    def too_large(context, recipe):
        raise torch.OutOfMemoryError("tried to allocate 28 GiB")

    monkeypatch.setattr("minisft.checking.context.CheckContext.train_in_scratch", too_large)
    results = examined(recipe_file, only="checkpoint.plain")
    assert "tried to allocate 28 GiB" in results["loss.mask"].detail
    assert {result.status for result in results.values()} == {"ok", "not run"}
    assert results["checkpoint.plain"].status == "ok"
