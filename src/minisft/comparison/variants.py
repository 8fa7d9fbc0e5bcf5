"""What is compared: every combination of the values that are varied, each a recipe with a name and a folder."""

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
# What may differ between two calls although a variant is trained already: it changes neither steps nor their figures.
_FREE_KEYS = ("save_every", "log_every", "report_to")


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and the values it takes, as they are written."""

    key: str
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.key or not self.values:
            raise UserError(f"--vary {self.key}", "it names no values", "write --vary key=value1,value2")
        if self.key == "output":
            raise UserError("--vary output", "each variant has a folder of its own already", "vary another key")
        twice = [value for value in self.values if self.values.count(value) > 1]
        if twice:
            raise UserError(f"--vary {self.key}", f"{twice[0]} stands there twice", "name each value once")


@dataclass(frozen=True)
class Variant:
    """One run of a comparison.

    Args:
        name: its folder's name, such as `zero2` or `learning_rate-2e-4`.
        overrides: what sets it apart, as dotted `key=value` words.
        recipe: the whole recipe, `output` being the variant's own folder; None where it cannot be one.
        error: why it cannot.
    """

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe | None
    error: str | None = None


def read_axes(strategies: str | None, varied: Sequence[str]) -> list[Axis]:
    """Read the options `--strategies A,B` and `--vary key=value1,value2`; without any, the four strategies.

    Raises:
        UserError: an option names no key or no values, or two name the same key.
    """
    axes = []
    if strategies is not None or not varied:
        names = (
            STRATEGIES if strategies is None else tuple(name.strip() for name in strategies.split(",") if name.strip())
        )
        unknown = [name for name in names if name not in STRATEGIES]
        if unknown or not names:
            problem = f"there is no strategy {unknown[0]!r}" if unknown else "it names none"
            raise UserError("--strategies", problem, f"name some of {','.join(STRATEGIES)}")
        axes.append(Axis(_STRATEGY, names))
    axes += [_read_axis(text) for text in varied]
    keys = [axis.key for axis in axes]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise UserError(f"--vary {twice[0]}", "this key is varied twice", "give all its values in one --vary")
    return axes


def _read_axis(text: str) -> Axis:
    """Split `key=value1,value2`; a value may be any YAML, such as `{rank: 8, alpha: 16}` or a quoted text."""
    key, separator, listed = text.partition("=")
    if not separator:
        raise UserError(f"--vary {text}", "it names no values", "write --vary key=value1,value2")
    source = f"[{listed}]"
    try:
        node = yaml.compose(source, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"--vary {text}", f"its values cannot be read ({problem})", "put each in quotes") from None
    assert isinstance(node, yaml.SequenceNode)
    return Axis(key.strip(), tuple(source[item.start_mark.index : item.end_mark.index] for item in node.value))


def choose_variants(path: Path, overrides: Sequence[str], axes: Sequence[Axis]) -> list[Variant]:
    """Make a variant of every combination of the axes' values.

    Args:
        path: the recipe file.
        overrides: what holds for all variants.
        axes: what is varied.

    Raises:
        UserError: no combination is a recipe; one that is none among others is a variant with an error.
    """
    output = Path(load_recipe(path, overrides).output)
    variants: list[Variant] = []
    errors: list[UserError] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        name = _name(axes, values, taken=[variant.name for variant in variants])
        words = tuple(f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True))
        try:
            recipe = replace(load_recipe(path, [*overrides, *words]), output=str(output / FOLDER / name))
            variants.append(Variant(name, words, recipe))
        except UserError as error:
            errors.append(error)
            variants.append(Variant(name, words, None, str(error)))
    if len(errors) == len(variants):
        raise errors[0]
    return variants


def _name(axes: Sequence[Axis], values: Sequence[str], taken: Sequence[str]) -> str:
    """Name a variant by its values: strategies by themselves, other values with the last part of their key."""
    parts = [
        value if axis.key == _STRATEGY else f"{axis.key.rpartition('.')[2]}-{value}"
        for axis, value in zip(axes, values, strict=True)
    ]
    name = re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-.") or "variant"
    name = name[:100]  # a folder's name has its limits
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(candidate for candidate in numbered if candidate not in taken)


def refuse_other_run(variant: Variant) -> None:
    """Refuse a folder whose run was begun otherwise: its figures would be taken for this variant's.

    Raises:
        UserError: naming the key that differs.
    """
    assert variant.recipe is not None
    run = RunFolder(Path(variant.recipe.output))
    if not run.is_run() or not run.has_begun():
        return
    earlier, now = _settings(load_run(run.root)), _settings(variant.recipe)
    for key in now:
        if now[key] != earlier.get(key):
            raise UserError(
                run.root,
                f"holds a run with {key} {json.dumps(earlier.get(key))}, and it is {json.dumps(now[key])} here",
                "choose another `output`, or pass --force to run all variants anew",
            )


def trajectory(variant: Variant) -> str:
    """Return what two variants share that should take the same steps: strategy and split of the batch do not count."""
    if variant.recipe is None:
        return f"none: {variant.name}"
    facts = json.dumps(run_identity(variant.recipe), sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _settings(recipe: Recipe) -> dict[str, object]:
    training = {f"training.{key}": value for key, value in asdict(recipe.training).items() if key not in _FREE_KEYS}
    return training | run_identity(recipe)
