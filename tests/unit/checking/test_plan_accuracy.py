"""Predictions that are far from the measurements, and runs that do not fit: the check for it is the first to fail."""

from dataclasses import replace
from functools import cached_property, partial

import torch

from minisft.checking import strategy_checks
from tests.unit.checking.examined import StepsInThisProcess, assert_first_to_fail, examined


def test_a_prediction_that_knows_nothing_of_the_process_itself(recipe_file):
    """It is off by more than twice: a tiny model takes little beside Python and its libraries."""

    class WithoutProcess(StepsInThisProcess):
        @cached_property
        def predictions(self):
            return tuple(replace(prediction, process_bytes=0.0) for prediction in super().predictions)

    results = examined(recipe_file, only="spend.memory", context=WithoutProcess)
    assert "GB, the plan says 0." in assert_first_to_fail(results, "spend.memory")


def test_a_run_that_does_not_fit(recipe_file):
    """The steps of the check are small and fit; the run's do not."""

    class OnSmallMachine(StepsInThisProcess):
        @cached_property
        def predictions(self):
            scratch, full_run = super().predictions
            return scratch, replace(full_run, usable_bytes=full_run.process_bytes)

    # The memory of the tests that ran before in this process is measured too.
    however_far_off = {"spend.memory": partial(strategy_checks.memory_is_as_planned, max_ratio=1e9)}
    results = examined(recipe_file, only="spend.memory", context=OnSmallMachine, runs=however_far_off)
    assert "the run needs" in assert_first_to_fail(results, "spend.memory")


def test_steps_that_take_far_longer_than_planned(recipe_file):
    """Steps of a tiny model are slower than planned, and would fail if short steps were compared."""
    strict = {"spend.time": partial(strategy_checks.time_is_as_planned, max_slowdown=1e-3, min_seconds=0.0)}
    results = examined(recipe_file, only="spend.time", context=StepsInThisProcess, runs=strict)
    assert "the plan says" in assert_first_to_fail(results, "spend.time")


def test_a_strategy_left_open_is_checked_as_the_plan_chooses_it(recipe_file):
    results = examined(recipe_file, "training.strategy=auto", only="strategy.steps", context=StepsInThisProcess)
    assert results["strategy.steps"].status == "ok"
    assert "under vanilla" in results["strategy.steps"].detail


def test_a_model_that_one_process_cannot_hold_is_not_a_failure(recipe_file):
    """A model that fits under ZeRO alone: what compares with one process is not run, with the reason."""

    class TooLarge(StepsInThisProcess):
        def train_in_scratch(self, recipe):
            raise torch.OutOfMemoryError("tried to allocate 28 GiB")

    results = examined(recipe_file, only="checkpoint.plain", context=TooLarge)
    assert "tried to allocate 28 GiB" in results["loss.mask"].detail
    assert {result.status for result in results.values()} == {"ok", "not run"}
    assert results["checkpoint.plain"].status == "ok"
