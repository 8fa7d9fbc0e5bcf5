"""The recipe: one YAML file and dotted overrides, typed and strict.

A recipe is a tree of frozen dataclasses. Reading one checks every key and every type against them and
names the line and the nearest valid key where something does not fit; combinations that cannot work are
refused by the dataclasses themselves.
"""

import contextlib
import difflib
import io
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from minisft.errors import UserError

STRATEGIES = ("vanilla", "zero1", "zero2", "zero3")
METRICS = ("bleu", "chrf")
BUILT_IN_MODELS = ("smollm2-135m",)


@dataclass(frozen=True)
class DataRecipe:
    source: str | list[Any] | dict[str, Any]
    format: Literal["auto", "sharegpt", "messages", "alpaca", "prompt_completion"] = "auto"
    template: str = "auto"
    train_on: Literal["assistant", "last"] = "assistant"
    max_length: int = 2048
    overflow: Literal["turns", "cut", "drop", "error"] = "turns"
    invalid: Literal["error", "skip", "repair"] = "error"
    test: str | list[Any] | dict[str, Any] | None = None
    test_fraction: float = 0.1
    limit: int | None = None
    verify: bool = True
    processes: int | None = None

    def __post_init__(self) -> None:
        _require_positive("data", self, "max_length", "limit", "processes")
        if not 0 <= self.test_fraction < 1:
            raise UserError(
                "data.test_fraction", f"{self.test_fraction} is no share", "give a number from 0 to below 1"
            )


@dataclass(frozen=True)
class LoraRecipe:
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        _require_positive("training.lora", self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            where = "training.lora.dropout"
            raise UserError(where, f"{self.dropout} is no share", "give a number from 0 to below 1")
        if not self.target_modules:
            raise UserError("training.lora.target_modules", "there is none", "name some, or use all-linear")


@dataclass(frozen=True)
class TrainingRecipe:
    strategy: Literal["vanilla", "zero1", "zero2", "zero3", "auto"] = "vanilla"
    processes: int = 1
    epochs: float = 8
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 8.0e-6
    weight_decay: float = 1.0e-5
    optimizer: str = "adamw"
    scheduler: str = "linear"
    scheduler_args: dict[str, int | float | str] = field(default_factory=dict)
    warmup_ratio: float = 0.03
    max_grad_norm: float | None = 2.0  # None does not clip
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    packing: bool = False
    save_every: Literal["epoch"] | int = "epoch"
    keep_optimizer: Literal["newest", "all"] = "newest"
    keep_checkpoints: int | None = None
    log_every: int = 1
    eval_every: Literal["epoch"] | int | None = None
    early_stopping: int | None = None
    lora: LoraRecipe | None = None
    offload: Literal["optimizer", "parameters"] | None = None
    gradient_checkpointing: bool = False
    row_tokens: int | None = None
    memory_limit_gb: float | None = None
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require_positive(
            "training", self, "processes", "epochs", "max_steps", "batch_size", "gradient_accumulation",
            "learning_rate", "max_grad_norm", "log_every", "row_tokens", "memory_limit_gb", "keep_checkpoints",
            "early_stopping",
        )  # fmt: skip
        _require_not_negative("training.", self, "weight_decay")
        for key in ("save_every", "eval_every"):
            if getattr(self, key) != "epoch":
                _require_positive("training", self, key)
        if self.early_stopping is not None and self.eval_every is None:
            what = "there is no held-out loss to stop on"
            raise UserError("training.early_stopping", what, "set training.eval_every, such as epoch, too")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(
                "training.warmup_ratio", f"{self.warmup_ratio} is no share", "give a number from 0 to below 1"
            )


@dataclass(frozen=True)
class EvaluationRecipe:
    metrics: list[str] = field(default_factory=lambda: list(METRICS))
    turns: Literal["last", "all"] = "last"
    max_new_tokens: int = 256
    examples: int = 3
    limit: int | None = None
    batch_size: int = 64
    prompts: str | list[str] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    processes: int | None = None
    backend: Literal["transformers", "vllm"] = "transformers"

    def __post_init__(self) -> None:
        _require_positive("evaluation", self, "max_new_tokens", "limit", "batch_size", "processes")
        _require_not_negative("evaluation.", self, "examples", "temperature")
        if not 0 < self.top_p <= 1:
            raise UserError("evaluation.top_p", f"{self.top_p} is no share", "give a number above 0, and at most 1")
        if self.prompts == [] or (isinstance(self.prompts, list) and not all(text.strip() for text in self.prompts)):
            raise UserError("evaluation.prompts", "there is an empty one, or none", "give texts, or leave the key out")
        if not self.metrics:
            raise UserError("evaluation.metrics", "there is none", f"name some of {', '.join(METRICS)}")
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(
                    "evaluation.metrics",
                    f"there is no metric {metric!r}",
                    f"choose among {', '.join(METRICS)}",
                )


@dataclass(frozen=True)
class Recipe:
    model: str
    output: str
    data: DataRecipe
    seed: int = 0
    trust_remote_code: bool = False
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def __post_init__(self) -> None:
        _require_not_negative("", self, "seed")


def _require_not_negative(section: str, recipe: Any, *keys: str) -> None:
    for key in keys:
        if getattr(recipe, key) < 0:
            raise UserError(f"{section}{key}", f"{getattr(recipe, key)} is below zero", "give zero or more")


def _require_positive(section: str, recipe: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(recipe, key)
        if value is not None and value <= 0:
            raise UserError(f"{section}.{key}", f"{value} is not above zero", "give a number above zero")


# --- reading a recipe ---------------------------------------------------------------------------------


def load_recipe(path: Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `dotted.key=value` overrides, whose values are YAML.

    Relative data paths are looked up from the current folder, then from the recipe's own.

    Raises:
        UserError: a missing file, broken YAML, an unknown key, a wrong type, a combination that cannot work.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            path, "there is no such recipe", "give the path of a recipe such as recipes/demo.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"the recipe cannot be read ({error})", "give a readable YAML file") from None
    tree = _parse_yaml(text, str(path))
    for override in overrides:
        _apply_override(tree, override)
    recipe = _build(Recipe, tree, str(path), "")
    check_combinations(recipe)
    return _with_found_sources(recipe, path.parent)


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def check_combinations(recipe: Recipe) -> None:
    """Refuse what no single key is to blame for.

    Raises:
        UserError: naming the key to change.
    """
    training = recipe.training
    if training.strategy == "zero3" and training.lora is not None and training.lora.load_in_4bit:
        raise UserError(
            "training.lora.load_in_4bit",
            "ZeRO-3 cannot shard weights of 4 bits",
            "use strategy vanilla, zero1 or zero2, or leave it false",
        )
    _check_offload(training)
    if training.eval_every is not None and recipe.data.test is None and recipe.data.test_fraction == 0:
        what = "there are no held-out conversations to compute a loss on"
        raise UserError("training.eval_every", what, "set data.test_fraction above 0, or data.test")
    if recipe.data.test is not None and recipe.data.test == recipe.data.source:
        raise UserError("data.test", "is the training source itself", "name another file, or use test_fraction")


def _check_offload(training: TrainingRecipe) -> None:
    if training.offload is None:
        return
    if training.strategy == "auto":
        what = "auto chooses among strategies that keep all on the GPU"
        raise UserError("training.offload", what, "name a ZeRO stage; `minisft plan` shows what each needs")
    if training.strategy == "vanilla":
        raise UserError("training.offload", "vanilla keeps all on the GPU", "use a ZeRO stage, or leave offload out")
    if training.offload == "parameters" and training.strategy != "zero3":
        raise UserError(
            "training.offload",
            f"{training.strategy} keeps whole parameters on every GPU",
            "use strategy zero3, or offload: optimizer",
        )


@dataclass
class _Node:
    """A YAML value with the line it stands on; mappings hold nodes by key."""

    value: Any
    line: int | None  # None: it came from an override


def _parse_yaml(text: str, where: str) -> _Node:
    try:
        root = yaml.compose(io.StringIO(text), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}", f"this is not YAML ({problem})", "mend the line") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(where, "a recipe is a mapping of keys", "start from recipes/demo.yaml")
    return _to_node(root, where)


def _to_node(node: yaml.Node, where: str) -> _Node:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        try:
            return _Node(yaml.safe_load(yaml.serialize(node)), line)
        except (yaml.YAMLError, ValueError) as error:  # an own tag, or a date such as 2024-13-45
            reason = getattr(error, "problem", None) or str(error)
            raise UserError(f"{where}:{line}", f"this value cannot be read ({reason})", "put it in quotes") from None
    mapping: dict[str, _Node] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in mapping:
            raise UserError(f"{where}:{key_node.start_mark.line + 1}", f"the key {key!r} stands twice", "remove one")
        mapping[key] = _to_node(value_node, where)
        if not isinstance(value_node, yaml.MappingNode):
            mapping[key].line = key_node.start_mark.line + 1
    return _Node(mapping, line)


def _apply_override(tree: _Node, override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise UserError(override, "is no override", "write key=value, such as training.epochs=3")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = text  # a value such as `a: b` or `[x` is meant as it stands
    *parents, last = dotted.split(".")
    for name in parents:
        child = tree.value.get(name)
        if child is None or not isinstance(child.value, dict):
            child = tree.value[name] = _Node({}, None)
        tree = child
    tree.value[last] = _override_node(value)


def _override_node(value: Any) -> _Node:
    if isinstance(value, dict):
        return _Node({str(key): _override_node(item) for key, item in value.items()}, None)
    return _Node(value, None)


def _build(kind: type, node: _Node, where: str, prefix: str) -> Any:
    """Build the dataclass `kind` from a mapping node, refusing unknown, missing and ill-typed keys."""
    hints = get_type_hints(kind)
    for key, child in node.value.items():
        if key not in hints:
            raise UserError(_place(where, child), f"unknown key {prefix + key!r}", _nearest(key, prefix, hints))
    values: dict[str, Any] = {}
    for entry in fields(kind):
        key = entry.name
        if key in node.value:
            values[key] = _convert(hints[key], node.value[key], where, prefix + key)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise UserError(where, f"the key {prefix + key!r} is missing", f"add `{prefix + key}: ...`")
    try:
        return kind(**values)
    except UserError as error:  # the dataclass names the key; the file and line are known here
        child = node.value.get(error.where.rpartition(".")[2])
        raise UserError(f"{_place(where, child or node)}: {error.where}", error.what, error.mend) from None


def _convert(hint: Any, node: _Node, where: str, key: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    value = node.value
    for option in options:
        if is_dataclass(option) and isinstance(value, dict):
            return _build(typing.cast(type, option), node, where, f"{key}.")
    value = _plain(node)
    for option in options:
        fits, converted = _fit(option, value)
        if fits:
            return converted
    raise UserError(f"{_place(where, node)}: {key}", f"{value!r} does not fit", f"give {_describe(options, value)}")


def _fit(option: Any, value: Any) -> tuple[bool, Any]:
    """Say whether `value` is of the type `option`, and give it as that type."""
    origin = get_origin(option)
    if option is type(None):
        return value is None, None
    if origin is Literal:
        return value in get_args(option) and not isinstance(value, bool), value
    if origin is list:
        (item,) = get_args(option)
        return isinstance(value, list) and all(item is Any or _fit(item, one)[0] for one in value), value
    if origin is dict:
        return _fit_dict(option, value)
    if option is float:
        return _fit_float(value)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, option), value


def _fit_dict(option: Any, value: Any) -> tuple[bool, Any]:
    """Fit each item of a mapping to the first type of its items that it is of."""
    _, item = get_args(option)
    if not isinstance(value, dict) or item is Any:
        return isinstance(value, dict), value
    fitted = {key: next((_fit(one, found)[1] for one in get_args(item) if _fit(one, found)[0]), None)
              for key, found in value.items()}  # fmt: skip
    return None not in fitted.values(), fitted


def _fit_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, str):  # YAML 1.1 takes 8e-6, without a dot, for text
        try:
            value = float(value)
        except ValueError:
            return False, value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False, value
    return value == value and abs(value) != float("inf"), float(value)


def _plain(node: _Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return node.value


def _describe(options: tuple[Any, ...], value: Any) -> str:
    names = []
    for option in options:
        if get_origin(option) is Literal:
            names += [repr(choice) for choice in get_args(option)]
        elif option is type(None):
            names.append("null")
        else:
            plain = get_origin(option) or option
            names.append({str: "text", int: "a whole number", float: "a number", bool: "true or false",
                          list: "a list", dict: "a mapping"}.get(plain, "a mapping of its keys"))  # fmt: skip
    close = difflib.get_close_matches(str(value), [name.strip("'") for name in names], n=1)
    return " or ".join(names) + (f"; did you mean {close[0]!r}?" if close else "")


def _place(where: str, node: _Node) -> str:
    return f"{where}:{node.line}" if node.line is not None else "the command line"


def _nearest(key: str, prefix: str, hints: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, hints, n=1)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    return f"valid keys here: {', '.join(hints)}"


def _with_found_sources(recipe: Recipe, folder: Path) -> Recipe:
    data = replace(recipe.data, source=_found(recipe.data.source, folder), test=_found(recipe.data.test, folder))
    if data.template.endswith((".jinja", ".jinja2", ".j2")):
        data = replace(data, template=_found(data.template, folder))
    prompts = recipe.evaluation.prompts
    if isinstance(prompts, str):
        prompts = _found(prompts, folder)
    evaluation = replace(recipe.evaluation, prompts=prompts)
    return replace(recipe, data=data, model=_found(recipe.model, folder), evaluation=evaluation)


def _found(source: Any, folder: Path) -> Any:
    """Make paths absolute: from the current folder, else from the recipe's; what is no path stays."""
    if isinstance(source, list):
        return [_found(item, folder) for item in source]
    if isinstance(source, dict):
        return {key: _found(item, folder) if key == "path" else item for key, item in source.items()}
    if not isinstance(source, str) or source in BUILT_IN_MODELS:
        return source
    for candidate in (Path(source).expanduser(), folder / source):
        with contextlib.suppress(OSError):  # a text too long for a path is none
            if candidate.exists():
                return str(candidate.resolve())
    return source
