"""`minisft plan`: the recipe's data, prepared where it is not yet, and the machine that was asked for."""

from dataclasses import dataclass
from pathlib import Path

from minisft.data.preparation import prepare
from minisft.errors import UserError
from minisft.planning.auto import limited
from minisft.planning.machines import load_of_machine, machine_named, require_count
from minisft.planning.plan import Plan, config_of, job_of, make_plan, prepared_sizes
from minisft.recipe import Recipe
from minisft.runs import RunFolder, is_same_run, open_run
from minisft.training.batching import Sizes


@dataclass(frozen=True)
class Wish:
    """What the command line asked for; None: this machine, and the recipe's processes."""

    gpu: str | None
    count: int | None
    nodes: int


def plan_for(recipe: Recipe, wish: Wish) -> Plan:
    """Plan a recipe for a machine.

    Raises:
        UserError: no such machine, an impossible count, or a model's configuration that does not do.
    """
    count = recipe.training.processes if wish.count is None else wish.count
    machine = limited(machine_named(wish.gpu, max(count, 1), recipe.training.precision), recipe)
    require_count(machine, count, wish.nodes)
    config_of(recipe)  # before anything is prepared
    sizes, notes = _sizes(recipe)
    if machine.kind == "cpu" and (busy := load_of_machine()) > machine.per_node / 2:
        notes += (f"others are at work (load {busy:.1f} on {machine.per_node} cores): an idle machine is faster",)
    job = job_of(recipe, machine, sizes=sizes, count=count, nodes=wish.nodes)
    return make_plan(recipe, job, notes)


def _sizes(recipe: Recipe) -> tuple[Sizes | None, tuple[str, ...]]:
    """Return the data's lengths, preparing it where needed; None, and a note why, where it cannot be prepared."""
    try:
        run = RunFolder(Path(recipe.output))
        if not (is_same_run(run, recipe) and run.has_begun()):
            with open_run(recipe, prepares_only=True):
                prepared = prepare(recipe)
            notes = () if prepared.cached else (f"prepared {prepared.train_rows:,} conversations in {prepared.folder}",)
            return prepared_sizes(recipe), notes
        return prepared_sizes(recipe), ()
    except UserError as error:
        assumed = "full rows and half of the tokens supervised are assumed, and the run's length is unknown"
        return None, (f"the data is not prepared ({error.where}: {error.what}): {assumed}",)
