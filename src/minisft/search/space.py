"""The settings that a search varies: `--vary KEY=LOW..HIGH` and `--vary KEY=A,B,C`, checked before any trial."""

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from minisft.comparison.variants import split_values
from minisft.errors import UserError
from minisft.recipe import Recipe, make_recipe
from minisft.recipe_schema import recipe_keys

SECTION = "training."
# Keys outside `training` that can be varied. Those of `data` change train rows only, which `TrainingRows` checks.
OTHER_KEYS = ("seed", "data.max_length", "data.overflow")
_REFUSED = {  # keys that cannot be varied, by their beginning: why, and what to do
    "model": (
        "losses of models with different tokenizers cannot be compared, and all trials share one base model",
        "make a search for each model, and compare the winners on the test rows",
    ),
    "output": ("each trial has a folder of its own", "leave it out"),
    "trust_remote_code": ("it does not change what is learned", "leave it out"),
    "evaluation": (
        "it does not change what is learned: two of its values would be the same trial",
        "vary keys of `training`; --objective names the metric that chooses the best trial",
    ),
    "data": (
        "it changes the validation rows, and trials are compared on the same rows",
        "make a search for each of its values; of `data`, max_length and overflow can be varied",
    ),
}
_FREE_SECTIONS = ("training.scheduler_args.",)  # their keys are those of the schedule
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*")
_WHOLE = re.compile(r"[+-]?\d+")
_RATES = ("learning_rate", "weight_decay")
_DECADE = 10.0  # a range of numbers that spans this factor is sampled on a logarithmic scale
_MOST_COMBINATIONS = 512  # of listed values that are checked together before the first trial
_HIDDEN_SIZE = 2000  # of the rule below
_RULE_RATE, _RULE_EXPONENT, _LORA_FACTOR = 5e-5, 0.781, 10.0


@dataclass(frozen=True)
class Range:
    """A key and the range of its values, both ends included.

    Args:
        key: Dotted key of the recipe.
        low: Smallest value.
        high: Largest value.
        whole: Whether the values are whole numbers.
    """

    key: str
    low: float
    high: float
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            problem = f"the range is upside down or empty: {self.low:g} is not below {self.high:g}"
            raise UserError(f"--vary {self.key}", problem, f"write --vary {self.key}={self.high:g}..{self.low:g}")

    @property
    def logarithmic(self) -> bool:
        """Whether values are drawn uniformly in their logarithm: rates, and other numbers over a decade or more."""
        if self.whole or self.low <= 0:
            return False
        return self.key.rpartition(".")[2] in _RATES or self.high / self.low >= _DECADE

    def __str__(self) -> str:
        return f"{self.key}={self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Choices:
    """A key and a list of its values: numbers, texts, lists or mappings, as YAML.

    Args:
        key: Dotted key of the recipe.
        texts: The values as the user wrote them.
    """

    key: str
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.texts:
            raise UserError(f"--vary {self.key}", "it lists no values", f"write --vary {self.key}=A,B or LOW..HIGH")
        twice = [text for text in self.texts if self.texts.count(text) > 1]
        if twice:
            raise UserError(f"--vary {self.key}", f"the value {twice[0]} occurs twice", "list each value once")

    def value(self, text: str) -> Any:
        """Return the value of one of the texts; `8e-6` without a dot is a number, as in a recipe."""
        value = yaml.safe_load(text)
        if isinstance(value, str) and re.fullmatch(_NUMBER, value.strip()):
            return float(value)
        return value

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.texts)}"


Axis = Range | Choices
Settings = dict[str, Any]  # the value of each varied key, by dotted key


def read_axis(option: str) -> Axis:
    """Read the value of one option `--vary`.

    Raises:
        UserError: It names no key or no values, the key cannot be varied, or the range is upside down.
    """
    key, separator, values = option.partition("=")
    key = key.strip()
    if not separator or not values.strip():
        problem = "it names no values"
        raise UserError(f"--vary {option}", problem, f"write --vary {key or 'KEY'}=LOW..HIGH or KEY=A,B,C")
    _require_key(key)
    found = _RANGE.fullmatch(values)
    if found is None:
        return Choices(key, tuple(text.strip() for text in split_values(option, values)))
    whole = all(_WHOLE.fullmatch(end) for end in found.groups())
    return Range(key, float(found[1]), float(found[2]), whole)


def _require_key(key: str) -> None:
    known = list(recipe_keys())
    varied = [name for name in known if name.startswith(SECTION) or name in OTHER_KEYS]
    if key in varied or key.startswith(_FREE_SECTIONS):
        return
    if key == "training":
        raise UserError(f"--vary {key}", "this is a section, not a key", "vary one of its keys, such as learning_rate")
    if key in known:
        problem, fix = _REFUSED[key.partition(".")[0]]
        raise UserError(f"--vary {key}", f"{key} cannot be varied: {problem}", fix)
    last = {name.rpartition(".")[2]: name for name in varied}
    close = difflib.get_close_matches(key, varied, n=1) or [
        last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)
    ]
    fix = f"did you mean {close[0]!r}?" if close else "`minisft schema` describes the keys of `training`"
    raise UserError(f"--vary {key}", f"unknown key {key!r}", fix)


def read_axes(varied: Sequence[str], recipe: Recipe) -> list[Axis]:
    """Read all options `--vary`, and check every value against the recipe before any trial.

    Raises:
        UserError: An option cannot be read, a key is varied twice, or the recipe refuses a value.
    """
    axes = [read_axis(option) for option in varied]
    keys = [axis.key for axis in axes]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise UserError(f"--vary {twice[0]}", "this key is varied twice", "give all its values in one --vary")
    for axis in axes:
        for value in _ends(axis):
            checked(recipe, {axis.key: value})
    listed = [axis for axis in axes if isinstance(axis, Choices)]
    for settings in itertools.islice(combinations(listed), _MOST_COMBINATIONS):
        checked(recipe, settings)
    return axes


def checked(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with other settings.

    Raises:
        UserError: The recipe refuses them; the message names the option.
    """
    try:
        return make_recipe(list(settings.items()), recipe)
    except UserError as error:
        named = ", ".join(f"{key}={value}" for key, value in settings.items())
        raise UserError(f"--vary {named}", f"{error.where}: {error.problem}", error.fix) from None


def _ends(axis: Axis) -> list[Any]:
    if isinstance(axis, Choices):
        return [axis.value(text) for text in axis.texts]
    return [int(end) if axis.whole else end for end in (axis.low, axis.high)]


def combinations(axes: Sequence[Choices]) -> "itertools.chain[Settings] | map[Settings]":
    """Return every combination of listed values, the last key varying fastest."""
    values = ([(axis.key, axis.value(text)) for text in axis.texts] for axis in axes)
    return map(dict, itertools.product(*values))


def count_combinations(axes: Sequence[Axis]) -> int | None:
    """Return the number of combinations where all axes list their values; None if one is a range of numbers."""
    sizes = []
    for axis in axes:
        if isinstance(axis, Choices):
            sizes.append(len(axis.texts))
        elif axis.whole:
            sizes.append(int(axis.high - axis.low) + 1)
        else:
            return None
    return math.prod(sizes)


def holds(axes: Sequence[Axis], settings: Settings) -> bool:
    """Return whether settings are in the space."""
    return all(_within(axis, settings[axis.key]) for axis in axes)


def _within(axis: Axis, value: Any) -> bool:
    if isinstance(axis, Choices):
        return value in [axis.value(text) for text in axis.texts]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return axis.low <= value <= axis.high and (not axis.whole or value == int(value))


def own_settings(recipe: Recipe, axes: Sequence[Axis]) -> Settings:
    """Return the values that the recipe itself has for the varied keys."""
    found: Settings = {}
    for axis in axes:
        value: Any = recipe
        for name in axis.key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        found[axis.key] = value
    return found


def default_options(recipe: Recipe, hidden_size: int) -> list[str]:
    """Return what is varied where nothing is named: learning rate, epochs, batch size, and the rank of LoRA.

    The learning rate spans two decades around 5e-5 x (2000 / hidden size)^0.781, ten times that for LoRA: the rule of
    Schulman et al. 2025, "LoRA Without Regret" (Thinking Machines), with the exponent that they fitted to Llama.

    Args:
        recipe: The recipe.
        hidden_size: Hidden size of the model.
    """
    training = recipe.training
    lora = training.lora is not None
    centre = _RULE_RATE * (_HIDDEN_SIZE / hidden_size) ** _RULE_EXPONENT * (_LORA_FACTOR if lora else 1.0)
    options = [f"training.learning_rate={centre / 10:.2g}..{centre * 10:.2g}"]
    if training.max_steps is None:
        options.append("training.epochs=1,2,3")
    options.append(f"training.batch_size={','.join(map(str, sorted({4, 8, 16, training.batch_size})))}")
    if lora:
        options.append("training.lora.rank=8,16,64")
    return options
