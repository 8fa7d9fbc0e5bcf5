"""What `minisft check` finds, in this process, and what must follow from a failure."""

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
        recipe_file: the recipe.
        overrides: of its keys.
        quick: leave out what needs the weights.
        only: leave out what neither stands before that check nor depends on it.
        context: the class of what is examined; one of a test has a fault.
        runs: by a check's name, what it calls in place of its own function: the same with other limits.
    """
    runs = runs or {}
    recipe = load_recipe(recipe_file, overrides)
    wanted = {check.name for check in CHECKS} if only is None else {only, *needed_by(only), *depending_on(only)}
    checks = [replace(check, run=runs.get(check.name, check.run)) for check in CHECKS if check.name in wanted]
    with open_run(recipe, prepares_only=True) as run:
        results = run_checks(context(recipe, run), quick=quick, on_result=lambda result: None, checks=checks)
    return {result.name: result for result in results}


def needed_by(name):
    """The checks that must be ok before `name` says anything."""
    direct = next(check.needs for check in CHECKS if check.name == name)
    return {*direct, *(further for one in direct for further in needed_by(one))}


def depending_on(name):
    """The checks that say nothing without `name`, directly or through others."""
    return {check.name for check in CHECKS if name in needed_by(check.name)}


def assert_first_to_fail(results, name):
    """`name` failed, before all others; what depends on it was not run for that reason, and the rest was."""
    failed = [result.name for result in results.values() if result.status == "FAILED"]
    assert failed[:1] == [name], [(r.name, r.status, r.detail) for r in results.values() if r.status != "ok"]
    assert results[name].fix
    for dependent in depending_on(name) & set(results):
        assert (results[dependent].status, results[dependent].detail) == ("not run", f"because {name} failed")
    return results[name].detail


class StepsHere(CheckContext):
    """Takes the steps in this process: the same code, without the start of another one."""

    def take_steps(self, recipe):
        take_steps_twice(Path(recipe.output))


def subject_with(encoder_type):
    """Return a class of subjects whose texts are encoded by an `Encoder` of this type."""

    class SubjectWithEncoder(CheckContext):
        @cached_property
        def encoder(self):
            return encoder_type(super().encoder.tokenizer, self.recipe.data.template)

    return SubjectWithEncoder


class TrainerWithFault:
    """A trainer in all but what a subclass does otherwise."""

    def __init__(self, trainer):
        self._trainer = trainer

    def __getattr__(self, name):
        return getattr(self._trainer, name)


def subject_training_with(trainer_type):
    """Return a class of subjects that are trained by this type of `TrainerWithFault`."""

    class SubjectWithTrainer(CheckContext):
        def train_in_scratch(self, recipe):
            self.live = trainer_type(super().train_in_scratch(recipe))
            return self.live

    return SubjectWithTrainer
