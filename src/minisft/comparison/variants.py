"""The variants of a comparison: every combination of the varied values, each a recipe with a name and a folder."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from minisft.errors import UserError
from minisft.recipe import STRATEGIES, Recipe, load_recipe
from minisft.run_folder import RunFolder, load_run, run_identity

FOLDER = "compare"  # inside the recipe's output
_STRATEGY = "training.strategy"
# Keys that may differ between two calls although a variant is trained already: they change neither the steps nor what
# is measured.
_FREE_KEYS = ("save_every", "log_every", "report_to")
_NAME_LENGTH = 100  # characters; file systems allow 255 bytes


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and the values it takes, as the user wrote them.

    Raises:
        UserError: There are no values, a value occurs twice, or the key is `output`.
    """

    key: str
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.key or not self.values:
            raise UserError(f"--vary {self.key}", "it lists no values", "write --vary key=value1,value2")
        if self.key == "output":
            raise UserError("--vary output", "each variant already has an output folder of its own", "vary another key")
        twice = [value for value in self.values if self.values.count(value) > 1]
        if twice:
            raise UserError(f"--vary {self.key}", f"the value {twice[0]} occurs twice", "list each value once")


@dataclass(frozen=True)
class Variant:
    """One run of a comparison.

    Args:
        name: Name of its folder, such as `zero2` or `learning_rate-2e-4`.
        overrides: The dotted `key=value` words in which it differs from the recipe.
        recipe: The complete recipe, with the variant's own folder as `output`; None if it is invalid.
        error: The message that says why the recipe is invalid.
    """

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe | None
    error: str | None = None


def read_axes(strategies: str | None, varied: Sequence[str]) -> list[Axis]:
    """Read the options `--strategies A,B` and `--vary key=value1,value2`; without any, the four strategies are varied.

    A value may be any YAML, such as `{rank: 8, alpha: 16}` or a quoted text.

    Raises:
        UserError: An option names no key or no values, or two name the same key.
    """
    axes = []

    # 1. --strategies.
    if strategies is not None or not varied:
        names: tuple[str, ...] = STRATEGIES
        if strategies is not None:
            names = tuple(name.strip() for name in strategies.split(",") if name.strip())
        unknown = [name for name in names if name not in STRATEGIES]
        if unknown or not names:
            problem = f"there is no strategy {unknown[0]!r}" if unknown else "it lists no strategy"
            raise UserError("--strategies", problem, f"name some of {','.join(STRATEGIES)}")
        axes.append(Axis(_STRATEGY, names))

    # 2. --vary: YAML finds the commas that separate values, and each value stays as the user wrote it.
    for option in varied:
        key, separator, values = option.partition("=")
        if not separator:
            raise UserError(f"--vary {option}", "it lists no values", "write --vary key=value1,value2")
        axes.append(Axis(key.strip(), tuple(split_values(option, values))))

    # 3. A key may be varied only once.
    keys = [axis.key for axis in axes]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise UserError(f"--vary {twice[0]}", "this key is varied twice", "give all its values in one --vary")
    return axes


def split_values(option: str, values: str) -> list[str]:
    """Return the values of an option `--vary`, each as the user wrote it: YAML finds the commas that separate them.

    Args:
        option: The option, for the message.
        values: The part after `key=`.

    Raises:
        UserError: The values are not YAML.
    """
    source = f"[{values}]"
    try:
        node = yaml.compose(source, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"--vary {option}", f"its values cannot be read ({problem})", "put each in quotes") from None
    assert isinstance(node, yaml.SequenceNode)
    return [source[item.start_mark.index : item.end_mark.index] for item in node.value]


def choose_variants(path: Path, overrides: Sequence[str], axes: Sequence[Axis]) -> list[Variant]:
    """Make a variant of every combination of the axes' values.

    Args:
        path: Path of the recipe file.
        overrides: The `key=value` words that hold for all variants.
        axes: The keys that are varied, with their values.

    Returns:
        The variants; one with an invalid recipe has an error.

    Raises:
        UserError: The recipes of all variants are invalid.
    """
    output = Path(load_recipe(path, overrides).output)
    variants: list[Variant] = []
    errors: list[UserError] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        # 1. Name it by its values: a strategy by itself, another value with the last part of its key before it.
        pairs = list(zip(axes, values, strict=True))
        parts = [value if axis.key == _STRATEGY else f"{axis.key.rpartition('.')[2]}-{value}" for axis, value in pairs]
        name = re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-.") or "variant"
        name = name[:_NAME_LENGTH]
        taken = [variant.name for variant in variants]
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        name = next(candidate for candidate in numbered if candidate not in taken)

        # 2. Load its recipe.
        words = tuple(f"{axis.key}={value}" for axis, value in pairs)
        try:
            recipe = replace(load_recipe(path, [*overrides, *words]), output=str(output / FOLDER / name))
            variants.append(Variant(name, words, recipe))
        except UserError as error:
            errors.append(error)
            variants.append(Variant(name, words, None, str(error)))
    if len(errors) == len(variants):
        raise errors[0]
    return variants


def refuse_other_run(variant: Variant) -> None:
    """Refuse a folder whose run has other settings: its figures would be taken for this variant's.

    Raises:
        UserError: A key differs; the message names it.
    """
    assert variant.recipe is not None
    run = RunFolder(Path(variant.recipe.output))
    if not run.is_run() or not run.has_begun():
        return
    earlier = _settings(load_run(run.root))
    for key, value in _settings(variant.recipe).items():
        if value != earlier.get(key):
            raise UserError(
                run.root,
                f"holds a run with {key} {json.dumps(earlier.get(key))}, but this variant has {json.dumps(value)}",
                "choose another `output`, or pass --force to run all variants again",
            )


def trajectory(variant: Variant) -> str:
    """Return a hash that is equal for variants that should take the same steps.

    The strategy, the number of processes and the split of the batch do not count.
    """
    if variant.recipe is None:
        return f"none: {variant.name}"
    identity = json.dumps(run_identity(variant.recipe), sort_keys=True, default=str)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings on which the steps or the measured figures of a run depend, by dotted key."""
    training = {f"training.{key}": value for key, value in asdict(recipe.training).items() if key not in _FREE_KEYS}
    return training | run_identity(recipe)
