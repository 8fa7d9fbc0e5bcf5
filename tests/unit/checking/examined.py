"""What `minisft check` finds, in this process, and what must follow from a failure."""

from pathlib import Path

from minisft.checking.run_checks import CHECKS, run_checks
from minisft.checking.scratch import take_steps_twice
from minisft.recipe import load_recipe
from minisft.run_start import open_run


def examined(recipe_file, *overrides, quick=False, only=None):
    """The results by name, in order; `only` leaves out what neither stands before that check nor depends on it."""
    recipe = load_recipe(recipe_file, overrides)
    wanted = {check.name for check in CHECKS} if only is None else {only, *needed_by(only), *depending_on(only)}
    checks = [check for check in CHECKS if check.name in wanted]
    with open_run(recipe, prepares_only=True) as run:
        results = run_checks(recipe, run, quick=quick, on_result=lambda result: None, checks=checks)
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


def steps_in_this_process(recipe):
    """In place of `run_steps_in_child`: the same code where a test can break it, and without the start of a process."""
    take_steps_twice(Path(recipe.output))
