"""The recipe of a command or of an API call: read, changed by overrides, with the user's consent to remote code.

A run folder, and a recipe inside one, may be untrusted: neither consents to code that comes with the model.
"""

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.errors import UserError
from minisft.text import printable

if TYPE_CHECKING:
    from minisft.recipe import Override, Recipe

_JUDGE_URL = "evaluation.judge.base_url"
# The keys and sections of the recipe that a command reads; a command that is not listed reads all.
_READ = {
    "prepare": ("model", "output", "seed", "trust_remote_code", "data"),
    "inspect": ("model", "output", "seed", "trust_remote_code", "data"),
    "check": ("model", "output", "seed", "trust_remote_code", "data", "training"),
    "plan": ("model", "output", "seed", "trust_remote_code", "data", "training"),
    "evaluate": (
        "model", "output", "seed", "trust_remote_code", "data.template", "training.precision", "evaluation",
    ),
    "contamination": ("model", "output", "trust_remote_code"),
    "report": ("output",),
    "export": ("model", "output", "trust_remote_code"),
    "chat": ("output",),
}  # fmt: skip


def read_recipe(
    verb: str,
    path: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    trust_remote_code: bool = False,
    takes_run: bool = False,
) -> "Recipe":
    """Read a recipe file, or the recipe of a run folder, with the overrides that the verb reads.

    Args:
        verb: Command; overrides of keys that it does not read are checked, named on stderr, and ignored.
        path: Path of a recipe or, with `takes_run`, of a run folder.
        overrides: Values by dotted key, or `key=value` words.
        trust_remote_code: Consent of the user to code that comes with the model.
        takes_run: Whether the path may be that of a run folder.

    Raises:
        UserError: The recipe cannot be read, or an override does not fit it.
    """
    from minisft.recipe import load_recipe, override_key
    from minisft.run_folder import DISTRUST_OVERRIDE, TRUST_OVERRIDE, came_with_run, load_run, run_of_recipe

    path = Path(path)
    if takes_run and not path.exists():
        fix = "give the path of a recipe, or of the run folder that its key `output` names; `minisft runs` lists them"
        raise UserError(path, "there is no such recipe or run folder", fix)
    consent = [TRUST_OVERRIDE] if trust_remote_code else []
    is_folder = path.is_dir()
    root = run_of_recipe(path)

    def load(chosen: Sequence["Override"]) -> "Recipe":
        words = [*chosen, *consent]
        if is_folder and takes_run:
            return load_run(path, words)
        if root is not None and not any(override_key(word) == "output" for word in words):
            return load_run(root, words)
        return load_recipe(path, [DISTRUST_OVERRIDE, *words] if came_with_run(path) else words)

    listed = as_overrides(overrides)
    recipe = _without_unread(verb, listed, load, is_folder)
    if verb == "evaluate" and (is_folder or root is not None or came_with_run(path)):
        overridden = {override_key(one) for one in listed}
        if not recipe.trust_remote_code:
            _refuse_functions(recipe, path, overridden)
        _refuse_judge_of_run(recipe, path, bool(overridden & {"evaluation.judge", _JUDGE_URL}))
        if "evaluation.benchmarks" not in overridden:
            _refuse_tasks_of_run(recipe, path)
    return recipe


def _refuse_functions(recipe: "Recipe", path: Path, overridden: Collection[str]) -> None:
    """Refuse `module:function` in a recipe that came with a run, which may be untrusted: it cannot make us import code.

    Raises:
        UserError: There is one, and the user did not name the metrics.
    """
    from minisft.metric_names import parse_metrics

    functions = [spec.metric for spec in parse_metrics(recipe.evaluation.metrics) if spec.is_function]
    if functions and not {"evaluation", "evaluation.metrics"} & set(overridden):
        problem = f"evaluation.metrics names {functions[0]}, and a run folder cannot consent to running code"
        named = json.dumps(recipe.evaluation.metrics)
        fix = f"if you trust it, add --trust-remote-code, or name the metrics yourself: 'evaluation.metrics={named}'"
        raise UserError(path, problem, fix)


def _refuse_judge_of_run(recipe: "Recipe", path: Path, named: bool) -> None:
    """Refuse a judge on another machine that only a run folder names: it would get the answers, and the user's key."""
    judge = recipe.evaluation.judge
    if judge is None or judge.is_local or named:
        return
    problem = f"the recipe of a run folder names {judge.base_url}, and would send answers and your key to it"
    fix = f"if you trust it, name it: {_JUDGE_URL}={judge.base_url}; or evaluate without it: evaluation.judge=null"
    raise UserError(f"{path}: {_JUDGE_URL}", problem, fix)


def _refuse_tasks_of_run(recipe: "Recipe", path: Path) -> None:
    """Refuse files of benchmark tasks that only a run folder names: they can run code."""
    files = [task for task in recipe.evaluation.benchmarks if task.endswith((".yaml", ".yml"))]
    if files:
        problem = f"the recipe of a run folder names {files[0]}, a task file, which can run code"
        fix = f"if you trust it, name the tasks: evaluation.benchmarks=[{', '.join(recipe.evaluation.benchmarks)}]"
        raise UserError(f"{path}: evaluation.benchmarks", problem, fix)


def change_recipe(
    verb: str, recipe: "Recipe", overrides: Mapping[str, Any] | Sequence[str] | None, *, trust_remote_code: bool = False
) -> "Recipe":
    """Change keys of a recipe that was read before, as `read_recipe` does.

    Raises:
        UserError: An override does not fit the recipe.
    """
    from minisft.recipe import make_recipe
    from minisft.run_folder import TRUST_OVERRIDE

    consent = [TRUST_OVERRIDE] if trust_remote_code else []
    listed = as_overrides(overrides)
    if not listed and not consent:
        return recipe
    return _without_unread(verb, listed, lambda chosen: make_recipe([*chosen, *consent], recipe), False)


def as_overrides(overrides: Mapping[str, Any] | Sequence[str] | None) -> list["Override"]:
    """Return overrides as a list, from either form.

    Raises:
        UserError: They are neither values by dotted key nor words.
    """
    if overrides is None:
        return []
    if isinstance(overrides, Mapping):
        listed: list[Any] = list(overrides.items())
        wrong = [key for key, _ in listed if not isinstance(key, str) or not key]
    else:
        listed = [overrides] if isinstance(overrides, str | bytes) else list(overrides)
        wrong = [word for word in listed if not isinstance(word, str)]
    if wrong or isinstance(overrides, str | bytes):
        where = wrong[0] if wrong else overrides
        raise UserError(repr(where), "is not an override", 'give a dict such as {"training.epochs": 3}')
    return listed


def _without_unread(
    verb: str, overrides: list["Override"], load: Callable[[Sequence["Override"]], "Recipe"], is_folder: bool
) -> "Recipe":
    """Load a recipe with the overrides that the command reads; the others are checked, named and ignored."""
    recipe = load(overrides)
    unread = _unread(verb, overrides, is_folder=is_folder)
    if not unread:
        return recipe
    note_unread(verb, unread)
    try:
        return load([override for override in overrides if override not in unread])
    except UserError:  # for example, an `eval_every` in the file that is incompatible with the overrides of the data
        return recipe


def _unread(verb: str, overrides: Sequence["Override"], is_folder: bool) -> list["Override"]:
    """Return the overrides of keys that the command does not read; the output of a run folder is the folder itself."""
    from minisft.recipe import override_key

    if verb not in _READ:
        return []
    read = [key for key in _READ[verb] if not (is_folder and key == "output")]
    keys = [(override, override_key(override)) for override in overrides]
    return [one for one, key in keys if not any(_within(key, section) or _within(section, key) for section in read)]


def note_unread(verb: str, overrides: Sequence["Override"]) -> None:
    """Print the keys of overrides that a command does not read, on stderr."""
    from minisft.recipe import override_key

    keys = ", ".join(map(override_key, overrides))
    print(printable(f"note: {verb} does not read {keys}"), file=sys.stderr)


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def built_in_recipe(name: str) -> Path:
    """Return a recipe that comes with MiniSFT: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    raise UserError(name, "the built-in recipe is missing", "install MiniSFT again")


def set_library_environment() -> None:
    """Set the variable that DeepSpeed reads when it is imported: its log level."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
