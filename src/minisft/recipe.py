"""The recipe: one YAML file and dotted overrides, typed and strict.

A recipe is a tree of frozen dataclasses. Reading one checks every key and every type against them, and an error names
the line and the nearest valid key; the dataclasses themselves refuse values that cannot work. docs/recipe.md explains
every key.

Pydantic would not make this shorter: line numbers, the nearest key, YAML's `8e-6` (a text in YAML 1.1) and the wording
of each message would still be ours, and importing it takes longer than the rest of `minisft --help`.
"""

import contextlib
import difflib
import glob
import numbers
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import yaml

from minisft.errors import UserError
from minisft.files import expand_pattern, expand_user_path, is_pattern
from minisft.metric_names import LOSS, METRICS, parse_metrics, require_best_by
from minisft.yaml_tree import MOST_CHARACTERS, MOST_DEPTH, Node, NotYamlError, parse, quoted

STRATEGIES = ("vanilla", "zero1", "zero2", "zero3")
PATTERN_KEYS = ("data.source", "data.test")  # keys that take patterns such as data/*.jsonl
BUILT_IN_MODELS = ("smollm2-135m",)
LARGEST_SEED = 2**32 - 1  # numpy's limit
MOST_EPOCHS = 1_000_000  # far beyond any use; merely counting the steps of more would take minutes


@dataclass(frozen=True)
class DataRecipe:
    """The section `data`: the conversations, their chat template, and the held-out split."""

    source: str | list[Any] | dict[str, Any]
    format: Literal["auto", "sharegpt", "messages", "alpaca", "prompt_completion"] = "auto"
    template: str = "auto"
    template_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    unroll: Literal["auto", "always", "never"] = "auto"
    train_on: Literal["assistant", "last"] = "assistant"
    max_length: int = 2048
    overflow: Literal["turns", "cut", "drop", "error"] = "turns"
    invalid: Literal["error", "skip", "repair"] = "error"
    test: str | list[Any] | dict[str, Any] | None = None
    test_fraction: float = 0.1
    validation_fraction: float | None = None
    seed: int | None = None
    limit: int | None = None
    verify: bool = True
    processes: int | None = None

    def __post_init__(self) -> None:
        _require_positive("data", self, "max_length", "limit", "processes")
        if not 0 <= self.test_fraction < 1:
            problem = f"must be at least 0 and below 1, and is {self.test_fraction}"
            raise UserError("data.test_fraction", problem, "give a fraction such as 0.1")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            problem = f"must be above 0 and below 1, and is {self.validation_fraction}"
            raise UserError("data.validation_fraction", problem, "give a fraction such as 0.1, or leave it out")
        if self.seed is not None:
            _require_not_negative("data.", self, "seed")


@dataclass(frozen=True)
class LoraRecipe:
    """The section `training.lora`: adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        _require_positive("training.lora", self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            problem = f"must be at least 0 and below 1, and is {self.dropout}"
            raise UserError("training.lora.dropout", problem, "give a probability such as 0.05")
        if not self.target_modules:
            raise UserError("training.lora.target_modules", "the list is empty", "name modules, or use all-linear")


@dataclass(frozen=True)
class TrainingRecipe:
    """The section `training`: strategy, batch, optimizer, checkpoints and memory."""

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
    early_stopping_by: Literal["loss", "best_by"] = "loss"
    lora: LoraRecipe | None = None
    offload: Literal["optimizer", "parameters"] | None = None
    gradient_checkpointing: bool = False
    sequence_parallel: int = 1
    deterministic: bool = False
    kernels: Literal["auto", "liger", "compile", "none"] = "auto"
    row_tokens: int | None = None
    memory_limit_gb: float | None = None
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require_positive(
            "training", self, "processes", "epochs", "max_steps", "batch_size", "gradient_accumulation",
            "learning_rate", "max_grad_norm", "log_every", "row_tokens", "memory_limit_gb", "keep_checkpoints",
            "early_stopping", "sequence_parallel",
        )  # fmt: skip
        _require_not_negative("training.", self, "weight_decay")
        for key in ("save_every", "eval_every"):
            if getattr(self, key) != "epoch":
                _require_positive("training", self, key)
        if self.epochs > MOST_EPOCHS:
            problem = f"{self.epochs:g} is too large: it must be at most {MOST_EPOCHS:,}"
            raise UserError("training.epochs", problem, "give fewer epochs, or set training.max_steps")
        if self.early_stopping is None and self.early_stopping_by != "loss":
            problem = "it says what early stopping goes by, and there is no early stopping"
            raise UserError("training.early_stopping_by", problem, "set training.early_stopping, such as 2, too")
        if self.early_stopping is not None and self.early_stopping_by == "loss" and self.eval_every is None:
            problem = "there is no held-out loss to stop on"
            raise UserError("training.early_stopping", problem, "set training.eval_every, such as epoch, too")
        if not 0 <= self.warmup_ratio < 1:
            problem = f"must be at least 0 and below 1, and is {self.warmup_ratio}"
            raise UserError("training.warmup_ratio", problem, "give a fraction of all steps such as 0.03")
        if self.processes % self.sequence_parallel:
            size = self.sequence_parallel
            problem = f"{size} does not divide training.processes, which is {self.processes}"
            fix = (
                f"set training.processes to a multiple of {size}, or sequence_parallel to a divisor of {self.processes}"
            )
            raise UserError("training.sequence_parallel", problem, fix)

    @property
    def replicas(self) -> int:
        """Number of copies of the model that compute different rows: processes / sequence_parallel."""
        return self.processes // self.sequence_parallel

    @property
    def global_batch(self) -> int:
        """Number of conversations of a step, or of packs: batch_size x replicas x gradient_accumulation."""
        return self.batch_size * self.replicas * self.gradient_accumulation


@dataclass(frozen=True)
class JudgeRecipe:
    """The section `evaluation.judge`: a model behind an OpenAI-compatible server that compares and grades answers."""

    base_url: str
    model: str
    pairwise: Literal["previous", "base", "all", "none"] = "previous"
    rubric: str | None = None
    show_reference: bool = False
    temperature: float | None = 0.0  # None leaves it to the server, as for max_tokens
    max_tokens: int | None = 512
    concurrency: int = 8
    timeout: float = 60.0
    max_retries: int = 5
    max_requests: int = 10_000

    def __post_init__(self) -> None:
        _require_positive("evaluation.judge", self, "max_tokens", "concurrency", "timeout", "max_requests")
        _require_not_negative("evaluation.judge.", self, "max_retries")
        if self.temperature is not None:
            _require_not_negative("evaluation.judge.", self, "temperature")
        try:
            url = urlsplit(self.base_url)
            is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:  # a bracket or a port that is none
            url, is_address = urlsplit(""), False
        if not is_address or url.query or url.fragment:
            problem = f"{self.base_url!r} is not the address of a server"
            raise UserError("evaluation.judge.base_url", problem, "write it such as http://127.0.0.1:8000/v1")
        if url.username is not None or url.password is not None:
            problem = "the address holds a user name or a password, and a recipe is copied into the run folder"
            fix = "leave it out, and set the environment variable MINISFT_JUDGE_API_KEY"
            raise UserError("evaluation.judge.base_url", problem, fix)
        for key in ("model", "rubric"):
            if getattr(self, key) is not None and not getattr(self, key).strip():
                raise UserError(f"evaluation.judge.{key}", "the text is empty", "write a text, or leave the key out")
        if self.pairwise == "none" and self.rubric is None:
            problem = "there is nothing to judge: no pairs are compared, and there is no rubric to grade answers by"
            raise UserError("evaluation.judge.pairwise", problem, "add evaluation.judge.rubric, or leave pairwise out")

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return urlsplit(self.base_url).hostname in ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class EvaluationRecipe:
    """The section `evaluation`: metrics, decoding and what to score."""

    metrics: list[str | dict[str, Any]] = field(default_factory=lambda: list(METRICS))
    best_by: str | None = None
    turns: Literal["last", "all"] = "last"
    max_new_tokens: int = 256
    examples: int = 3
    limit: int | None = None
    batch_size: int = 64
    prompts: str | list[str] | None = None
    retain: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    processes: int | None = None
    backend: Literal["transformers", "vllm"] = "transformers"
    tensor_parallel_size: int | None = None  # of vLLM: number of GPUs that share one model; None: as many as it needs
    gpu_memory_utilization: float = 0.9  # of vLLM: the share of a GPU's memory that it may take
    judge: JudgeRecipe | None = None
    benchmarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require_positive(
            "evaluation", self, "max_new_tokens", "limit", "batch_size", "processes", "tensor_parallel_size"
        )
        if not 0 < self.gpu_memory_utilization <= 1:
            problem = f"must be above 0 and at most 1, and is {self.gpu_memory_utilization}"
            raise UserError("evaluation.gpu_memory_utilization", problem, "give a share of the memory such as 0.9")
        for key in ("tensor_parallel_size", "gpu_memory_utilization"):
            if self.backend != "vllm" and getattr(self, key) != getattr(EvaluationRecipe, key):
                problem = f"only vLLM reads it, and evaluation.backend is {self.backend}"
                raise UserError(f"evaluation.{key}", problem, "add evaluation.backend: vllm, or leave the key out")
        _require_not_negative("evaluation.", self, "examples", "temperature")
        if not 0 < self.top_p <= 1:
            problem = f"must be above 0 and at most 1, and is {self.top_p}"
            raise UserError("evaluation.top_p", problem, "give a probability such as 0.9")
        if len(set(self.benchmarks)) < len(self.benchmarks) or not all(task.strip() for task in self.benchmarks):
            raise UserError("evaluation.benchmarks", "a task is empty or named twice", "name each task once")
        if self.prompts == [] or (isinstance(self.prompts, list) and not all(text.strip() for text in self.prompts)):
            problem = "the list, or one of its prompts, is empty"
            raise UserError("evaluation.prompts", problem, "give texts, or leave the key out")
        require_best_by(self.best_by, parse_metrics(self.metrics))


@dataclass(frozen=True)
class Recipe:
    """A complete recipe, with the default of every key that the file leaves out."""

    model: str
    output: str
    data: DataRecipe
    seed: int = 0
    trust_remote_code: bool = False
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def __post_init__(self) -> None:
        _require_not_negative("", self, "seed")
        if self.seed > LARGEST_SEED:
            problem = f"{self.seed} is too large: it must be at most {LARGEST_SEED}"
            raise UserError("seed", problem, "give a number of 32 bits, as numpy and torch take it")

    @property
    def data_seed(self) -> int:
        """The seed of the split and of the sources' weights: `data.seed`, or `seed`."""
        return self.seed if self.data.seed is None else self.data.seed


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

# A change to one key: `dotted.key=value` as on the command line, its value as YAML, or the key and a Python value.
Override = str | tuple[str, Any]


def override_key(override: Override) -> str:
    """Return the dotted key that an override changes."""
    return override.partition("=")[0] if isinstance(override, str) else override[0]


def load_recipe(path: Path, overrides: typing.Sequence[Override] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Relative data paths are looked up from the current folder, then from the recipe's own. A leading `~` is the home
    folder. A key or an override without a value means the default.

    Raises:
        UserError: a missing file, broken YAML, an unknown key, a wrong type, a combination that cannot work, a path
            that is none.
    """
    return _recipe_of(_parse_recipe(_read_recipe(path), str(path)), str(path), path.parent, overrides)


def make_recipe(overrides: typing.Sequence[Override], base: Recipe | None = None) -> Recipe:
    """Make a recipe without a file: from its keys alone, or from another recipe with some keys changed.

    Raises:
        UserError: as `load_recipe`.
    """
    tree = Node({}, None, place="the recipe") if base is None else _node_of(asdict(base), "recipe", "the recipe")
    return _recipe_of(tree, "the recipe", Path.cwd(), overrides)


def _recipe_of(tree: Node, where: str, folder: Path, overrides: typing.Sequence[Override]) -> Recipe:
    for override in overrides:
        _apply_override(tree, override)
    recipe = _build(Recipe, tree, where, "")
    check_combinations(recipe)
    try:
        return _resolve_paths(recipe, folder)
    except UserError as error:
        raise UserError(f"{_line_of(error.where, tree, where)}: {error.where}", error.problem, error.fix) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def check_combinations(recipe: Recipe) -> None:
    """Refuse combinations of keys that cannot work.

    Raises:
        UserError: A combination cannot work; the message names the key to change.
    """
    training = recipe.training
    # 1. Quantized weights.
    if training.strategy == "zero3" and training.lora is not None and training.lora.load_in_4bit:
        raise UserError(
            "training.lora.load_in_4bit",
            "ZeRO-3 cannot shard 4-bit weights",
            "use strategy vanilla, zero1 or zero2, or leave it false",
        )

    # 2. Offloading.
    offload = training.offload
    if offload is not None and training.strategy == "auto":
        problem = "auto chooses among strategies that keep everything on the GPU"
        raise UserError("training.offload", problem, "name a ZeRO stage; `minisft plan` shows what each needs")
    if offload is not None and training.strategy == "vanilla":
        problem = "vanilla keeps everything on the GPU"
        raise UserError("training.offload", problem, "use a ZeRO stage, or leave offload out")
    if offload == "parameters" and training.strategy != "zero3":
        problem = f"{training.strategy} keeps complete parameters on every GPU"
        raise UserError("training.offload", problem, "use strategy zero3, or offload: optimizer")

    # 3. Early stopping by a generated metric.
    if training.early_stopping_by == "best_by":
        if recipe.evaluation.best_by in (None, LOSS):
            problem = (
                f"evaluation.best_by is {recipe.evaluation.best_by or 'not set'}, so it names no metric to stop by"
            )
            fix = "set evaluation.best_by to one of evaluation.metrics, such as bleu, or leave early_stopping_by out"
            raise UserError("training.early_stopping_by", problem, fix)
        if recipe.evaluation.backend == "vllm":
            problem = "vLLM would take the GPU memory that training needs"
            raise UserError("training.early_stopping_by", problem, "use evaluation.backend transformers, or loss")

    # 4. Held-out data.
    if training.early_stopping_by == "best_by" and recipe.data.test is None and recipe.data.test_fraction == 0:
        problem = "there are no held-out conversations to answer"
        raise UserError("training.early_stopping_by", problem, "set data.test_fraction above 0, or data.test")
    if training.eval_every is not None and recipe.data.test is None and recipe.data.test_fraction == 0:
        problem = "there are no held-out conversations to compute a loss on"
        raise UserError("training.eval_every", problem, "set data.test_fraction above 0, or data.test")
    if recipe.data.test is not None and recipe.data.validation_fraction is not None:
        problem = "data.test holds the test rows already, so none have to be kept away from the validation rows"
        fix = "leave data.test out and set data.test_fraction instead, or leave validation_fraction out"
        raise UserError("data.validation_fraction", problem, fix)
    if recipe.data.test is not None and recipe.data.test == recipe.data.source:
        raise UserError("data.test", "is the training source itself", "name another file, or use test_fraction")


def _read_recipe(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_CHARACTERS + 1)  # a device never ends, and a larger file is refused anyway
    except FileNotFoundError:
        fix = "give the path of a recipe; `minisft init DATA` writes one for your data"
        raise UserError(path, "there is no such recipe", fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"the recipe cannot be read ({error})", "give a readable YAML file") from None


def _parse_recipe(text: str, where: str) -> Node:
    root = parse(text, where)
    if not isinstance(root.value, dict):
        raise UserError(where, "a recipe is a mapping of keys", "start from recipes/demo.yaml")
    return root


def _apply_override(tree: Node, override: Override) -> None:
    if isinstance(override, str):
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise UserError(override, "is not an override", "write key=value, such as training.epochs=3")
        try:
            node = parse(text, f"the command line: {dotted}", lines=False)
        except NotYamlError:
            node = Node(text, None)  # a value such as `a: b` or `[x` is meant as it stands
    else:
        dotted = override[0]
        node = _node_of(override[1], dotted)
    *parents, last = dotted.split(".")
    for name in parents:
        child = tree.value.get(name)
        if child is None or not isinstance(child.value, dict):
            child = tree.value[name] = Node({}, None, place=node.place)
        tree = child
    tree.value[last] = node


def _node_of(value: Any, where: str, place: str = "the override", depth: int = 0) -> Node:
    """Return a Python value as YAML would give it: a mapping, a list, text, a number, true, false or null.

    Raises:
        UserError: it is of another type, or it holds itself.
    """
    if depth > MOST_DEPTH:
        raise UserError(where, f"its value is nested more than {MOST_DEPTH} levels deep", "give a flatter value")
    if isinstance(value, typing.Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise UserError(where, f"the key {odd[0]!r} is not text", "write keys as text")
        items = {str(key): _node_of(item, f"{where}.{key}", place, depth + 1) for key, item in value.items()}
        return Node(items, None, place=place)
    if isinstance(value, list | tuple):
        return Node([_node_of(item, where, place, depth + 1) for item in value], None, place=place)
    if value is None or isinstance(value, bool):
        return Node(value, None, place=place)
    if isinstance(value, str | Path):
        return Node(str(value), None, place=place)
    if isinstance(value, numbers.Real):  # a plain number: YAML cannot write those of numpy
        return Node(int(value) if isinstance(value, numbers.Integral) else float(value), None, place=place)
    fix = "give text, a number, True, False, None, a list or a dict"
    raise UserError(where, f"a value of the type {type(value).__name__} fits no key of a recipe", fix)


def _build(kind: type, node: Node, where: str, prefix: str) -> Any:
    """Build the dataclass `kind` from a mapping node; a key without a value, as in `lora:`, has its default.

    Raises:
        UserError: A key is unknown or missing, or its value has the wrong type.
    """
    hints = get_type_hints(kind)
    for key, child in node.value.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            fix = f"did you mean {prefix + close[0]!r}?" if close else f"valid keys here: {', '.join(hints)}"
            raise UserError(_place(where, child), f"unknown key {quoted(prefix + key)}", fix)
    values: dict[str, Any] = {}
    for entry in fields(kind):
        key = entry.name
        child = node.value.get(key)
        if child is not None and not child.empty:
            values[key] = _convert(hints[key], child, where, prefix + key)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            place, lack = (where, "is missing") if child is None else (_place(where, child), "has no value")
            raise UserError(place, f"the key {prefix + key!r} {lack}", f"add `{prefix + key}: ...`")
    try:
        return kind(**values)
    except UserError as error:  # the dataclass knows the key; only here are the file and the line known
        child = node.value.get(error.where.rpartition(".")[2])
        raise UserError(f"{_place(where, child or node)}: {error.where}", error.problem, error.fix) from None


def _convert(hint: Any, node: Node, where: str, key: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    value = node.value
    for option in options:
        if is_dataclass(option) and isinstance(value, dict):
            return _build(typing.cast(type, option), node, where, f"{key}.")
    value = node.plain()
    for option in options:
        fits, converted = _coerce(option, value)
        if fits:
            return converted
    raise UserError(
        f"{_place(where, node)}: {key}", f"{quoted(value)} does not fit", f"give {_describe(options, value)}"
    )


def _coerce(option: Any, value: Any) -> tuple[bool, Any]:
    """Return whether `value` is of the type `option`, and the value converted to that type."""
    origin = get_origin(option)
    if option is type(None):
        return value is None, None
    if origin is Literal:
        return value in get_args(option) and not isinstance(value, bool), value
    if origin is list:
        (item,) = get_args(option)
        kinds = get_args(item) if get_origin(item) in (Union, types.UnionType) else (item,)
        fits = isinstance(value, list) and all(
            any(kind is Any or _coerce(kind, element)[0] for kind in kinds) for element in value
        )
        return fits, value
    if origin is dict:
        return _coerce_dict(option, value)
    if option is float:
        return _coerce_float(value)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, option), value


def _coerce_dict(option: Any, value: Any) -> tuple[bool, Any]:
    """Convert each value of a mapping to the first allowed type that it has."""
    _, item = get_args(option)
    if not isinstance(value, dict) or item is Any:
        return isinstance(value, dict), value
    converted = {key: next((_coerce(kind, entry)[1] for kind in get_args(item) if _coerce(kind, entry)[0]), None)
                 for key, entry in value.items()}  # fmt: skip
    return None not in converted.values(), converted


def _coerce_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, str):  # in YAML 1.1, 8e-6 without a dot is text
        try:
            value = float(value)
        except ValueError:
            return False, value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False, value
    return value == value and abs(value) != float("inf"), float(value)


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
    close = difflib.get_close_matches(quoted(value).strip("'"), [name.strip("'") for name in names], n=1)
    return " or ".join(names) + (f"; did you mean {close[0]!r}?" if close else "")


def _place(where: str, node: Node) -> str:
    return f"{where}:{node.line}" if node.line is not None else node.place


def _line_of(key: str, tree: Node, where: str) -> str:
    """Return the place of a dotted key, or of the longest part of it that the recipe holds."""
    for name in key.split("."):
        if not isinstance(tree.value, dict) or name not in tree.value:
            break
        tree = tree.value[name]
    return _place(where, tree)


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make all paths of the recipe absolute, so that nothing that reads the recipe has to expand them again.

    Raises:
        UserError: A path is blank, or in the home of a user that does not exist; `where` is its key.
    """
    data, evaluation = recipe.data, recipe.evaluation
    source, test = _resolve_path(data.source, folder, "data.source"), _resolve_path(data.test, folder, "data.test")
    template = data.template
    if not template.strip() or template.startswith("~") or template.endswith((".jinja", ".jinja2", ".j2")):
        template = _resolve_path(template, folder, "data.template")
    prompts = evaluation.prompts
    if isinstance(prompts, str):
        prompts = _resolve_path(prompts, folder, "evaluation.prompts")
    retain = None if evaluation.retain is None else _resolve_path(evaluation.retain, folder, "evaluation.retain")
    benchmarks = [
        _resolve_path(task, folder, "evaluation.benchmarks") if task.endswith((".yaml", ".yml")) else task
        for task in evaluation.benchmarks
    ]
    return replace(
        recipe,
        output=str(expand_user_path(recipe.output, "output")),
        data=replace(data, source=source, test=test, template=template),
        model=_resolve_path(recipe.model, folder, "model"),
        evaluation=replace(evaluation, prompts=prompts, retain=retain, benchmarks=benchmarks),
    )


def _resolve_path(source: Any, folder: Path, key: str) -> Any:
    """Make paths absolute, relative to the current folder or else to the recipe's; other values are left unchanged.

    Args:
        source: A path, a pattern of paths such as data/*.jsonl, a hub id, or a list or mapping of these.
        folder: The folder of the recipe.
        key: The key in the recipe, for messages.
    """
    if isinstance(source, list):
        return [_resolve_path(item, folder, key) for item in source]
    if isinstance(source, dict):
        sets = key == "data.test" and "path" not in source  # a mapping of names to sources
        return {
            name: _resolve_path(item, folder, key) if sets or name == "path" else item for name, item in source.items()
        }
    if not isinstance(source, str) or source in BUILT_IN_MODELS:
        return source
    path = expand_user_path(source, key)
    bases = (Path.cwd(), folder.absolute())
    with contextlib.suppress(OSError):  # a text that is too long to be a path
        for base in bases:
            if (base / path).exists():
                return str((base / path).resolve())
        for base in bases if key in PATTERN_KEYS and is_pattern(path) else ():
            if expand_pattern(base_pattern := Path(glob.escape(str(base))) / path):
                return str(base_pattern)
    return str(path) if path.is_absolute() else source
