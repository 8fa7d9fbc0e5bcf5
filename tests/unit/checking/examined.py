"""The checks of `minisft check`, run in this process, and what must follow from a failure."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from minisft.checking.context import CheckContext
from minisft.checking.run_checks import CHECKS, run_checks
from minisft.checking.scratch import take_steps_twice
from minisft.recipe import load_recipe
from minisft.run_start import open_run


def examined(recipe_file, *overrides, quick=False, only=None, context=CheckContext, runs=None):
    """Run the checks on a recipe, and return the results by name, in order.

    Args:
        recipe_file: The recipe.
        overrides: Overrides of its keys.
        quick: Skip the checks that need the weights.
        only: Run this check, those that it needs and those that depend on it; None runs all.
        context: Class of the context; a test passes one that has a fault.
        runs: By the name of a check, the function to call in place of its own: the same one with other limits.
    """
    runs = runs or {}
    recipe = load_recipe(recipe_file, overrides)
    wanted = {check.name for check in CHECKS} if only is None else {only, *needed_by(only), *depending_on(only)}
    checks = [replace(check, run=runs.get(check.name, check.run)) for check in CHECKS if check.name in wanted]
    checks = [check for check in checks if {*check.needs} <= wanted]
    with open_run(recipe, prepares_only=True) as run:
        results = run_checks(context(recipe, run), quick=quick, on_result=lambda result: None, checks=checks)
    return {result.name: result for result in results}


def needed_by(name):
    """Return the checks that must be ok before `name` says anything."""
    direct = next(check.needs for check in CHECKS if check.name == name)
    return {*direct, *(further for one in direct for further in needed_by(one))}


def depending_on(name):
    """Return the checks that depend on `name`, directly or through others."""
    return {check.name for check in CHECKS if name in needed_by(check.name)}


def assert_first_to_fail(results, name):
    """Assert that `name` failed before all others, and that the checks that depend on it were not run for that reason."""
    failed = [result.name for result in results.values() if result.status == "FAILED"]
    assert failed[:1] == [name], [(r.name, r.status, r.detail) for r in results.values() if r.status != "ok"]
    assert results[name].fix
    for dependent in depending_on(name) & set(results):
        assert (results[dependent].status, results[dependent].detail) == ("not run", f"because {name} failed")
    return results[name].detail


class StepsInThisProcess(CheckContext):
    """A context that takes the steps in this process, with the same code."""

    def take_steps(self, recipe):
        take_steps_twice(Path(recipe.output))


def context_with_encoder(encoder_type):
    """Return a context class whose texts are encoded by an `Encoder` of this type."""

    class ContextWithEncoder(CheckContext):
        @cached_property
        def encoder(self):
            return encoder_type(super().encoder.tokenizer, self.recipe.data.template)

    return ContextWithEncoder


class TrainerWithFault:
    """A trainer whose subclasses replace one method each."""

    def __init__(self, trainer):
        self._trainer = trainer

    def __getattr__(self, name):
        return getattr(self._trainer, name)


def context_with_trainer(trainer_type):
    """Return a context class whose trainer is of this type of `TrainerWithFault`."""

    class ContextWithTrainer(CheckContext):
        def train_in_scratch(self, recipe):
            self.live = trainer_type(super().train_in_scratch(recipe))
            return self.live

    return ContextWithTrainer
