"""The command `init`: looks at data, model and machine, and writes a commented recipe."""

import contextlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.console import say, warn
from minisft.data.encoder import Encoder
from minisft.data.sources import parse_sources, source_files, source_names
from minisft.errors import UserError
from minisft.models import load_tokenizer, resolve_model
from minisft.new_recipe import choices
from minisft.new_recipe.data_survey import RowSurvey, TokenSurvey, open_data, survey_rows, survey_tokens
from minisft.new_recipe.findings import (
    Chosen,
    Found,
    cost_lines,
    data_lines,
    first_look,
    next_commands,
    recipe_entries,
    warnings_of,
)
from minisft.new_recipe.machine_fit import answer_seconds, choose_disk, fit_to_machine, processes_of_machine
from minisft.new_recipe.recipe_text import recipe_text
from minisft.planning.machines import machine_named
from minisft.planning.model_cost import read_config
from minisft.recipe import load_recipe, make_recipe
from minisft.training.device import on_cpu
from minisft.version import __version__

_TEMPLATES = (("[INST]", "mistral"), ("<|start_header_id|>", "llama3"), ("<|user|>", "zephyr"))  # by a token they write
_FALLBACK_TEMPLATE = "chatml"
_MOST_REFUSED = 0.05  # share of the sample that the model's own template may refuse before another one is tried
_OWN_FOLDER = "give --output-recipe a file in a folder of your own, or change the permissions"
_ANOTHER_FILE = "name another one with --output-recipe, or move this one"


@dataclass(frozen=True)
class InitOptions:
    """The arguments of `init`.

    Args:
        source: Value of the recipe's key `data.source`.
        model: Value of the recipe's key `model`.
        output_recipe: Path of the file to write.
        gpu: Name of the machine to train on; None is this one.
        count: Number of GPUs; None is one, or all of this machine.
        trust_remote_code: Run code that comes with the model.
    """

    source: Any
    model: str
    output_recipe: Path
    gpu: str | None = None
    count: int | None = None
    trust_remote_code: bool = False


def init(options: InitOptions) -> Path:
    """Write a recipe for the data, the model and the machine, and print what it will cost; return its path.

    Raises:
        UserError: The data, the model or the machine cannot be used, or the recipe cannot be written or exists.
    """
    path = options.output_recipe
    # 1. Refuse what needs no look at the data.
    _require_writable(path)
    sources = parse_sources(options.source, "DATA")
    for source in sources:
        source_files(source)
    _require_machine(options)
    data = open_data(sources)
    # 2. The model, and then all rows.
    model = resolve_model(options.model, options.trust_remote_code, weights=False)
    config = read_config(model.folder, options.trust_remote_code)
    tokenizer = load_tokenizer(model.folder, options.trust_remote_code)
    rows = survey_rows(data)
    template, tokens = _choose_template(tokenizer, rows)
    found = Found(
        source=options.source,
        data_name=", ".join(source_names(sources)),
        model=options.model,
        rows=rows,
        tokens=tokens,
        template=template,
        own_template=template == "auto",
        family=str(config.model_type),
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
    )
    for line in data_lines(found):
        say(line)
    # 3. The values, and the recipe with its reasons.
    chosen = _choose(found, options, model.folder)
    costs, warnings = cost_lines(found, chosen, options.gpu), warnings_of(found, chosen)
    head = [
        f"Written by `minisft init {found.data_name}` of MiniSFT {__version__}. Each value has its reason above it. A "
        "key that is not here has its default; `minisft schema` describes all keys.",
        "",
        *next_commands(chosen, path),
        "",
        *data_lines(found),
        *costs,
        *(f"warning: {warning}" for warning in warnings),
    ]
    _write(path, recipe_text(head, recipe_entries(found, chosen, path)))
    # 4. What it will cost, and how to go on.
    for line in costs:
        say(line)
    for line in warnings:
        warn(f"warning: {line}")
    say(f"written: {path}; each value has its reason there")
    say("next:")
    for line in (*next_commands(chosen, path), *first_look(found, chosen, path)):
        say(line)
    return path


def _choose(found: Found, options: InitOptions, model_folder: Path) -> Chosen:
    """Choose every value of the recipe."""
    rows, tokens = found.rows, found.tokens
    # 1. What depends on the data and the number of processes.
    max_length = choices.choose_max_length(tokens.lengths, tokens.ends, found.context, found.sample)
    held_out = choices.choose_held_out(rows.usable, rows.keys)
    train_rows = max(1, rows.usable - held_out.conversations)
    epochs = choices.choose_epochs(train_rows)
    processes = processes_of_machine(options.gpu, options.count)
    batch = choices.choose_batch(train_rows, epochs.value, processes)
    draft = make_recipe(
        [
            ("model", options.model),
            ("output", _free_output(found.data_name)),
            ("data.source", options.source),
            ("data.template", found.template),
            ("data.max_length", max_length.value),
            ("data.test_fraction", held_out.fraction),
            ("training.processes", processes),
            ("training.epochs", epochs.value),
            ("training.batch_size", batch.batch_size),
            ("training.gradient_accumulation", batch.accumulation),
            ("trust_remote_code", options.trust_remote_code),
        ]
    )
    # 2. What fits the machine; a conversation may have one row for each answer.
    run_rows = max(1, round(train_rows * len(tokens.lengths) / tokens.conversations))
    sizes = choices.sizes_of_run(tokens.lengths, tokens.supervised, max_length.value, run_rows)
    run = fit_to_machine(draft, sizes, options.gpu)
    rate = choices.choose_learning_rate(run.parameters, run.recipe.training.lora is not None)
    # 3. What is scored, and the checkpoints that the disk holds: one for each epoch.
    new_tokens = choices.choose_max_new_tokens(tokens.answers, tokens.is_last, found.context)
    checkpoints = math.ceil(epochs.value)
    evaluation = choices.choose_evaluation(
        held_out.conversations,
        tokens.answers.size / tokens.conversations,
        answer_seconds(run.job, tokens, new_tokens.value),
        1 + checkpoints,
        run.training_seconds,
    )
    disk, keep = choose_disk(run.recipe, model_folder, checkpoints, here=options.gpu is None)
    return Chosen(max_length, held_out, epochs, batch, run, rate, new_tokens, evaluation, keep, disk)


def _free_output(data_name: str) -> str:
    """Return a folder under outputs/ that does not exist yet, named after the data."""
    name = Path(data_name.split(", ")[0]).name.split(".")[0].strip("*?[]{} ").replace(" ", "-") or "run"
    output, number = Path("outputs") / name, 1
    while output.exists() or output.is_symlink():
        number += 1
        output = Path("outputs") / f"{name}-{number}"
    return str(output)


def _write(path: Path, text: str) -> None:
    """Check that the text can be read back as a recipe, and write it as a new file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "recipe.yaml"
        copy.write_text(text, encoding="utf-8")
        load_recipe(copy)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(path, "this file exists, and is not replaced", _ANOTHER_FILE) from None
    except OSError as error:
        raise UserError(path, f"the recipe cannot be written ({error.strerror})", _OWN_FOLDER) from None


# --- what can be refused at once --------------------------------------------------------------------------


def _require_writable(path: Path) -> None:
    """Refuse a recipe that exists, that no command would take for a recipe, or whose folder cannot be written."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(path, "a recipe is a YAML file", "give --output-recipe a name that ends in .yaml")
    if path.exists() or path.is_symlink():
        raise UserError(path, "this file exists, and is not replaced", _ANOTHER_FILE)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(folder, "there is no such folder", "create it, or name another file with --output-recipe")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"the recipe cannot be written there ({error.strerror})"
        raise UserError(folder, problem, _OWN_FOLDER) from None


def _require_machine(options: InitOptions) -> None:
    """Refuse an unknown GPU, and a number of GPUs where there are none."""
    if options.gpu is None and options.count is not None and on_cpu():
        fix = "name the GPU of the other machine, such as --gpu h100, or leave --count out"
        raise UserError(f"--count {options.count}", "this machine has no GPU, and --gpu names none", fix)
    if options.gpu is not None and options.gpu.lower() != "cpu":
        machine = machine_named(options.gpu, 1)
        if options.count is not None and options.count > machine.per_node:
            problem = f"init writes recipes for one machine, which has at most {machine.per_node} {machine.name}"
            fix = f"give at most --count {machine.per_node}; `minisft plan` plans the recipe for several machines"
            raise UserError(f"--count {options.count}", problem, fix)


def _choose_template(tokenizer: Any, rows: RowSurvey) -> tuple[str, TokenSurvey]:
    """Return the template to train with, and the sample in it.

    It is the model's own one, unless there is none, or it refuses many conversations and another one refuses fewer.
    """
    vocabulary = tokenizer.get_vocab()
    other = next((name for token, name in _TEMPLATES if token in vocabulary), _FALLBACK_TEMPLATE)
    try:
        encoder = Encoder(tokenizer, "auto")
    except UserError as error:
        if error.where != "data.template" or "no chat template" not in error.problem:
            raise
        return other, survey_tokens(rows, Encoder(tokenizer, other))
    tokens = None
    with contextlib.suppress(UserError):  # it can write none of the rows
        tokens = survey_tokens(rows, encoder)
        if tokens.refused <= _MOST_REFUSED * (tokens.refused + tokens.conversations):
            return "auto", tokens
    other_tokens = survey_tokens(rows, Encoder(tokenizer, other))
    if tokens is not None and tokens.refused <= other_tokens.refused:
        return "auto", tokens
    return other, other_tokens
