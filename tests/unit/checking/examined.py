"""What `minisft check` finds, in this process, and what must follow from a failure."""

from pathlib import Path

from minisft.checking.check import CHECKS, examine
from minisft.checking.steps import take_steps_twice
from minisft.recipe import load_recipe
from minisft.runs import open_run


def examined(recipe_file, *overrides, quick=False):
    """The results by name, in order."""
    recipe = load_recipe(recipe_file, overrides)
    with open_run(recipe, prepares_only=True) as run:
        results = examine(recipe, run, quick=quick, tell=lambda result: None)
    return {result.name: result for result in results}


def depending_on(name):
    """The checks that say nothing without `name`, directly or through others."""
    found = {name}
    for check in CHECKS:
        if found & set(check.needs):
            found.add(check.name)
    return found - {name}


def assert_first_to_fail(results, name):
    """`name` failed, before all others; what depends on it was not run for that reason, and the rest was."""
    failed = [result.name for result in results.values() if result.status == "FAILED"]
    assert failed[:1] == [name], [(r.name, r.status, r.detail) for r in results.values() if r.status != "ok"]
    assert results[name].mend
    for dependent in depending_on(name):
        assert (results[dependent].status, results[dependent].detail) == ("not run", f"because {name} failed")
    return results[name].detail


def steps_in_this_process(recipe):
    """In place of `run_steps_in_child`: the same code where a test can break it, and without the start of a process."""
    take_steps_twice(Path(recipe.output))
