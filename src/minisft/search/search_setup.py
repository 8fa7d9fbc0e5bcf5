"""Before the first trial: what is refused, the lock of the folder, and the prepared rows that all trials share."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisft.console import say, warn
from minisft.errors import UserError
from minisft.files import hold_lock
from minisft.metric_names import LOSS
from minisft.recipe import Recipe
from minisft.run_folder import run_identity
from minisft.search.search_result import RESULT
from minisft.search.space import Axis, Choices, checked, combinations, default_options
from minisft.search.study import Study
from minisft.search.training_rows import BaseModel, TrainingRows, prepare_folder

_DEFAULT_VALIDATION = 0.1
_ENOUGH_ROWS = 20


def default_axes(recipe: Recipe) -> list[str]:
    from minisft.models import load_config, resolve_model

    resolved = resolve_model(recipe.model, recipe.trust_remote_code)
    config = load_config(resolved.folder, recipe.trust_remote_code).get_text_config()
    options = default_options(recipe, int(config.hidden_size))
    say("nothing is named, so these are varied: " + " ".join(f"--vary {option}" for option in options))
    return options


def require_feasible_values(recipe: Recipe, axes: Sequence[Axis]) -> None:
    """Check every listed value on this machine: an optimizer may be missing, or a schedule refuse its arguments."""
    from minisft.training.run_training import require_feasible

    require_feasible(recipe)
    for axis in axes:
        if isinstance(axis, Choices):
            for settings in combinations([axis]):
                require_feasible(checked(recipe, settings))


def refuse_folder(output: Path, *, resume: bool) -> None:
    """Refuse an output folder that is no new one, or under --resume none of a search."""
    is_search = (output / RESULT).exists() or (output / ".search.lock").exists()
    if resume and not is_search:
        raise UserError(output, "there is no search to resume", "leave --resume out")
    if is_search and not resume and (output / RESULT).exists():
        raise UserError(output, "holds a search already", "pass --resume to go on with it, or choose another `output`")
    if not is_search and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(output, "this is neither a new folder nor that of a search", "name a new folder as `output`")


@contextlib.contextmanager
def only_search(output: Path) -> Iterator[None]:
    """Create the output folder, and hold its lock."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"this `output` folder cannot be made ({error.strerror})"
        raise UserError(output, problem, "name another folder") from None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(output / ".search.lock"))
        except BlockingIOError:
            raise UserError(output, "another search is writing into this folder", "wait for it to end") from None
        yield


def with_fixed_split(recipe: Recipe, axes: Sequence[Axis]) -> Recipe:
    """Return the recipe with its split fixed by `data.seed`, if `seed` is varied: trials have the same rows."""
    if not any(axis.key == "seed" for axis in axes):
        return recipe
    return replace(recipe, data=replace(recipe.data, seed=recipe.data_seed))


def with_validation(recipe: Recipe, fraction: float | None) -> Recipe:
    """Return the recipe of the trials: its test rows are validation rows, taken from the train rows."""
    data = recipe.data
    share = fraction or data.validation_fraction or _DEFAULT_VALIDATION
    if data.test is not None or data.test_fraction == 0:
        return replace(recipe, data=replace(data, test=None, test_fraction=share, validation_fraction=None))
    return replace(recipe, data=replace(data, validation_fraction=share))


def search_identity(recipe: Recipe, axes: Sequence[Axis], seed: int, objective: str) -> dict[str, Any]:
    """Return what must stay the same when a search goes on."""
    # the recipe's own values of varied keys of `data`, and its split, say which rows all trials are validated on
    varied = {axis.key for axis in axes if not axis.key.startswith("data.")}
    kept = {key: value for key, value in run_identity(recipe).items() if key not in varied}
    kept["--objective"] = objective
    if "seed" in varied:
        kept["data.seed"] = recipe.data_seed
    return json.loads(json.dumps({**kept, "--vary": [str(axis) for axis in axes], "--seed": seed}, default=str))


def refuse_other_study(study: Study, identity: dict[str, Any], output: Path, *, resume: bool) -> None:
    """Record the identity of a new study; refuse a storage that holds another one.

    Raises:
        UserError: The message names what differs.
    """
    earlier = study.facts.get("identity")
    if earlier is None or not study.settings:
        study.record("identity", identity)
        return
    earlier = {"--objective": LOSS, **earlier}  # a study of an earlier version has no other one
    changed = [key for key in {**earlier, **identity} if earlier.get(key) != identity.get(key)]
    if changed:
        key = changed[0]
        values = f"{key} is {earlier.get(key)!r} there, {identity.get(key)!r} here"
        problem = f"the storage holds the study of another search: {values}"
        raise UserError(output, problem, "restore what changed, or choose another `output`")
    if not resume:
        raise UserError(output, "the storage holds this search already", "pass --resume, or choose another `output`")


def prepare_rows(recipe: Recipe, trials_recipe: Recipe, axes: Sequence[Axis], *, begun: bool) -> TrainingRows:
    """Prepare the rows of the trials, and the test rows.

    Args:
        recipe: The recipe as the user gave it, with its test rows.
        trials_recipe: The recipe of the trials, whose test rows are the validation rows.
        axes: What is varied.
        begun: Whether the search goes on.

    Raises:
        UserError: The data cannot be used, hold no validation row, or are not those that the search began with, or a
            value of a varied key changes the validation rows.
    """
    from minisft.models import resolve_model, weights_fingerprint

    output = Path(trials_recipe.output)
    resolved = resolve_model(recipe.model, recipe.trust_remote_code)
    base = BaseModel(resolved, weights_fingerprint(resolved.folder))
    prepared = prepare_folder(trials_recipe, output / "data", base, begun=begun)
    if prepared.test_rows == 0:
        problem = f"no conversation is left to validate on, of {prepared.train_rows:,}"
        raise UserError("--validation", problem, "give more conversations with different first prompts")
    if prepared.test_rows < _ENOUGH_ROWS:
        warn(f"{prepared.test_rows} validation rows tell few settings apart: raise --validation")
    say(f"data: {prepared.train_rows:,} train rows, {prepared.test_rows:,} validation rows")
    tested = replace(recipe, data=replace(recipe.data, validation_fraction=None))
    prepare_folder(tested, output / "test", base, begun=begun)
    rows = TrainingRows(trials_recipe, base, begun)
    rows.require_same_validation(axes)
    return rows
