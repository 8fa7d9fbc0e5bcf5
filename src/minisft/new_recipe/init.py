"""The command `init`: looks at data, model and machine, and writes a commented recipe."""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisft.console import say, warn
from minisft.data.encoder import Encoder
from minisft.data.sources import parse_sources, source_files
from minisft.errors import UserError
from minisft.files import expand_user_path
from minisft.models import load_tokenizer, resolve_model
from minisft.new_recipe import choices
from minisft.new_recipe.choices import BatchChoice, Choice, EvaluationChoice, count_text, percent
from minisft.new_recipe.data_survey import (
    MOST_PARSED,
    RowSurvey,
    TokenSurvey,
    open_data,
    survey_rows,
    survey_tokens,
)
from minisft.new_recipe.recipe_text import Entry, recipe_text
from minisft.planning.machines import Machine, machine_named, require_count
from minisft.planning.model_cost import read_config
from minisft.planning.plan_table import duration
from minisft.planning.planner import choose, gigabytes, job_of, make_plan, needed_bytes, predict_recipe
from minisft.planning.prediction import Job, Prediction
from minisft.recipe import STRATEGIES, LoraRecipe, Recipe, load_recipe, make_recipe
from minisft.training.checkpoints import size_text
from minisft.training.device import on_cpu
from minisft.training.disk import checkpoint_size, free_space, most_added
from minisft.version import __version__

_TEMPLATES = (("[INST]", "mistral"), ("<|start_header_id|>", "llama3"), ("<|user|>", "zephyr"))  # by a token they write
_FALLBACK_TEMPLATE = "chatml"
_MOST_REFUSED = 0.05  # share of the sample that the model's own template may refuse before another one is tried
# Decoding reaches about half the rate of a training step's products on a CPU (docs/performance.md). On a GPU, a step of
# `transformers` decoding takes at least 30 ms, however small the model is.
_DECODING_SHARE, _GPU_STEP_SECONDS = 0.5, 0.03
_EVALUATION_BATCH = 64
_FIRST_ROWS = 400  # of a first look at what the model learns
_LONG = 1800.0  # seconds of training from which a first look is proposed
_OWN_FOLDER = "give --output-recipe a file in a folder of your own, or change the permissions"
_ANOTHER_FILE = "name another one with --output-recipe, or move this one"
_DISK_SHARE = 0.8  # of the free space that a run may take before fewer checkpoints are kept


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


@dataclass(frozen=True)
class Found:
    """What `init` found out about data and model, before anything is chosen.

    Args:
        options: The arguments.
        rows: What the rows hold.
        tokens: The sample in the model's tokens.
        template: Value of the recipe's key `data.template`.
        own_template: Whether the model has a template of its own.
        family: The model's type, such as llama.
        context: Largest number of tokens that the model takes; None where its configuration does not say.
    """

    options: InitOptions
    rows: RowSurvey
    tokens: TokenSurvey
    template: str
    own_template: bool
    family: str
    context: int | None

    @property
    def sample(self) -> str:
        """Describe the rows that were tokenized."""
        count = self.tokens.conversations
        return f"{count:,} sampled conversations" if count < self.rows.usable else f"{count:,} conversations"

    @property
    def data_name(self) -> str:
        source = self.options.source
        return source if isinstance(source, str) else ", ".join(map(str, source))


def init(options: InitOptions) -> Path:
    """Write a recipe for the data, the model and the machine, and print what it will cost; return its path.

    Raises:
        UserError: The data, the model or the machine cannot be used, or the recipe cannot be written or exists.
    """
    # 1. Refuse what needs no look at the data.
    _require_writable(options.output_recipe)
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
    text_config = config.get_text_config()
    found = Found(
        options=options,
        rows=rows,
        tokens=tokens,
        template=template,
        own_template=template == "auto",
        family=str(config.model_type),
        context=getattr(text_config, "max_position_embeddings", None),
    )
    for line in data_lines(found):
        say(line)
    # 3. The values, the recipe with its reasons, and its check by the project's own reader.
    made = _make_recipe(found, model.folder)
    _write(options.output_recipe, made)
    # 4. What it will cost, and how to go on.
    for line in made.cost:
        say(line)
    for line in made.warnings:
        warn(f"warning: {line}")
    say(f"written: {options.output_recipe}; each value has its reason there")
    say("next:")
    for line in _next_commands(options.output_recipe, made.recipe):
        say(line)
    if made.first_look:
        say(made.first_look)
    return options.output_recipe


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


# --- the summary of the data ------------------------------------------------------------------------------


def data_lines(found: Found) -> list[str]:
    """Return what was found in the data as lines of a short table."""
    rows, tokens = found.rows, found.tokens
    more = "" if rows.all_read else " or more"
    lines = [
        f"data       {rows.rows:,} rows{more} in {found.data_name}, format {', '.join(dict.fromkeys(rows.formats))}"
    ]
    if rows.parsed < rows.rows or not rows.all_read:
        lines.append(f"           the first {rows.parsed:,} rows are looked at; the others are counted and sampled")
    turns = ", ".join(f"{name} {number:,}" for name, number in rows.turns.most_common())
    lines.append(f"turns      {turns}")
    if rows.problems:
        reasons = ", ".join(f"{name} {number:,}" for name, number in rows.problems.most_common())
        lines.append(f"invalid    {reasons}; {rows.repairable:,} of these rows can be repaired")
    lines.append(
        f"repeated   {rows.duplicates:,} conversations repeat an earlier one, {rows.near_duplicates:,} more nearly do"
    )
    held = [f"tools in {rows.with_tools:,}"] * (rows.with_tools > 0)
    held += [f"reasoning in {rows.with_reasoning:,}"] * (rows.with_reasoning > 0)
    if held:
        lines.append(f"holds      {', '.join(held)} conversations")
    lines.append(f"scripts    {', '.join(f'{name} {percent(share)}' for name, share in tokens.scripts.items())}")
    points = np.percentile(tokens.lengths, (5, 50, 95, 99, 100), method="nearest").astype(int)
    names = ("5%", "50%", "95%", "99%", "max")
    named = ", ".join(f"{name} {point:,}" for name, point in zip(names, points, strict=True))
    template = "the model's own template" if found.own_template else f"the template {tokens.template}"
    lines.append(f"lengths    {named} tokens, of {found.sample} in {template}")
    share = tokens.supervised.sum() / tokens.lengths.sum()
    answer = np.percentile(tokens.answers, (50, 99, 100), method="nearest").astype(int)
    lines.append(
        f"answers    50% {answer[0]:,}, 99% {answer[1]:,}, max {answer[2]:,} tokens; {share:.0%} of all tokens are "
        "supervised"
    )
    if tokens.refused:
        reasons = ", ".join(f"{name} {number:,}" for name, number in tokens.stats.section("skipped").items())
        lines.append(f"refused    the template cannot write {tokens.refused:,} of the sample: {reasons}")
    return lines


# --- the recipe -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeRecipe:
    """A recipe, its text, what it costs, and what the user should know."""

    recipe: Recipe
    text: str
    cost: tuple[str, ...]
    warnings: tuple[str, ...]
    first_look: str


def _make_recipe(found: Found, model_folder: Path) -> MadeRecipe:
    options, rows, tokens = found.options, found.rows, found.tokens
    # 1. What depends on the data alone.
    max_length = choices.choose_max_length(tokens.lengths, tokens.ends, found.context, found.sample)
    test_fraction = choices.choose_test_fraction(rows.usable)
    held_out = round(rows.usable * test_fraction.value)
    train_rows = max(1, rows.usable - held_out)
    epochs = choices.choose_epochs(train_rows)
    # 2. The machine and its number of processes.
    machine = machine_named(options.gpu, options.count or 1)
    processes = options.count or (torch.cuda.device_count() if options.gpu is None and machine.kind == "gpu" else 1)
    require_count(machine, processes, 1)
    batch = choices.choose_batch(train_rows, epochs.value, processes)
    draft = make_recipe(
        [
            ("model", options.model),
            ("output", _free_output(options)),
            ("data.source", options.source),
            ("data.template", found.template),
            ("data.max_length", max_length.value),
            ("data.test_fraction", test_fraction.value),
            ("training.processes", processes),
            ("training.epochs", epochs.value),
            ("training.batch_size", batch.batch_size),
            ("training.gradient_accumulation", batch.accumulation),
            ("trust_remote_code", options.trust_remote_code),
        ]
    )
    # 3. Full fine-tuning where it fits, else gradient checkpointing, LoRA, or both.
    sizes = choices.sizes_of_run(tokens.lengths, tokens.supervised, max_length.value, _rows_of_run(found, train_rows))
    job = job_of(draft, machine, sizes=sizes, count=processes)
    fitted, prediction, memory_reason = _fit(draft, job)
    parameters = job.cost("vanilla", None).parameters
    rate = choices.choose_learning_rate(parameters, fitted.training.lora is not None)
    # 4. What is scored.
    new_tokens = choices.choose_max_new_tokens(tokens.answers, tokens.is_last, found.context)
    seconds = _answer_seconds(job, tokens, new_tokens.value)
    training_seconds = prediction.total_seconds or 0.0
    evaluation = choices.choose_evaluation(
        max(1, held_out),
        tokens.answers.size / tokens.conversations,
        seconds,
        1 + int(np.ceil(epochs.value)),
        training_seconds,
    )
    # 5. The disk.
    chosen = replace(fitted, training=replace(fitted.training, learning_rate=rate.value))
    disk, keep = _choose_disk(chosen, model_folder, int(np.ceil(epochs.value)), here=options.gpu is None)
    # 6. All of it as text.
    entries = [
        *_first_entries(found, parameters, draft.output),
        *_data_entries(found, max_length, test_fraction),
        *_training_entries(chosen, epochs, batch, rate, memory_reason, keep),
        *_evaluation_entries(evaluation, new_tokens),
    ]
    cost = (
        f"model      {options.model}: {count_text(parameters)} parameters, {found.family}, "
        f"{_context_text(found.context)}, {_template_text(found)}",
        f"machine    {_machine_text(job, options)}",
        f"cost       {_cost_text(chosen, prediction, evaluation)}; {disk}",
    )
    warnings = _warnings(found, chosen, prediction, job)
    head = [
        f"Written by `minisft init {found.data_name}` of MiniSFT {__version__}. Each value has its reason above it; "
        "docs/init.md has the rules and their sources. A key that is not here has its default (docs/recipe.md).",
        "",
        *_next_commands(options.output_recipe, draft),
        "",
        *data_lines(found),
        *cost,
        *(f"warning: {warning}" for warning in warnings),
    ]
    first_look = ""
    if training_seconds > _LONG and rows.usable > 2 * _FIRST_ROWS:
        seconds = training_seconds * _FIRST_ROWS / rows.usable
        first_look = (
            f"a first look, in about {duration(seconds)}: minisft train {options.output_recipe} "
            f"data.limit={_FIRST_ROWS} {'training.gradient_accumulation=1 ' if batch.accumulation > 1 else ''}"
            f"output={draft.output}-first"
        )
    return MadeRecipe(chosen, recipe_text(head, entries), cost, warnings, first_look)


def _rows_of_run(found: Found, train_conversations: int) -> int:
    """Return the number of training rows: a conversation may have one row for each answer."""
    each = len(found.tokens.lengths) / found.tokens.conversations
    return max(1, round(train_conversations * each))


def _fit(draft: Recipe, job: Job) -> tuple[Recipe, Prediction, str]:
    """Return the recipe in the simplest form that fits the machine, its prediction, and the reason."""
    strategies = STRATEGIES if job.processes > 1 else ("vanilla",)
    reasons: list[str] = []
    tried = [draft]
    for lora, checkpointing in ((None, False), (None, True), (LoraRecipe(), False), (LoraRecipe(), True)):
        training = replace(draft.training, lora=lora, gradient_checkpointing=checkpointing)
        tried.append(replace(draft, training=training))
        predictions = [predict_recipe(tried[-1], job, strategy) for strategy in strategies]
        chosen, reason = choose(predictions)
        name = ("LoRA" if lora else "full fine-tuning") + (", gradient checkpointing" if checkpointing else "")
        if chosen is not None:
            before = f"; {'; '.join(reasons)}" if reasons else ""
            strategy: Any = chosen.setting.strategy
            fitted = replace(tried[-1], training=replace(training, strategy=strategy))
            return fitted, chosen, f"{name} with {reason}{before}"
        least = min(predictions, key=needed_bytes)
        reasons.append(f"{name} would need {gigabytes(needed_bytes(least))}")
    least = min(predictions, key=needed_bytes)
    strategy = least.setting.strategy
    fitted = replace(tried[-1], training=replace(tried[-1].training, strategy=strategy))
    return fitted, least, f"nothing fits {gigabytes(least.usable_bytes)}: {'; '.join(reasons)}"


def _answer_seconds(job: Job, tokens: TokenSurvey, new_tokens: int) -> float:
    """Predict the seconds of generating an answer in a batch, over all processes."""
    cost, machine = job.cost("vanilla", None), job.machine
    prompt = float(np.mean(tokens.ends - tokens.answers))
    per_token = cost.forward_flops + 2.0 * cost.hidden_size * cost.vocabulary
    rate = machine.flops[job.precision] * machine.utilisation * _DECODING_SHARE
    seconds = (prompt * cost.forward_flops + new_tokens * per_token) / rate
    if machine.kind == "gpu":
        step = max(_GPU_STEP_SECONDS, 2.0 * cost.parameters / machine.bandwidth)
        seconds = max(seconds, new_tokens * step / _EVALUATION_BATCH)
    return seconds / (job.processes if machine.kind == "gpu" else 1)


def _choose_disk(recipe: Recipe, model_folder: Path, checkpoints: int, *, here: bool) -> tuple[str, int | None]:
    """Return how much disk the run needs, as text, and how many checkpoints to keep; None: all."""
    size = checkpoint_size(recipe, model_folder)
    needed = most_added([], checkpoints, size, recipe.training)
    if not here:
        return f"{size_text(needed)} of disk", None
    output = Path(recipe.output).absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    free = free_space(there)
    if needed <= _DISK_SHARE * free or checkpoints < 2:
        return f"{size_text(needed)} of disk, {size_text(free)} free", None
    fewer = most_added([], checkpoints, size, replace(recipe.training, keep_checkpoints=1))
    return f"{size_text(fewer)} of disk, {size_text(free)} free", 1


def _free_output(options: InitOptions) -> str:
    """Return a folder under outputs/ that does not exist yet, named after the data."""
    source = options.source if isinstance(options.source, str) else options.source[0]
    if isinstance(source, dict):
        source = source["path"]
    name = Path(str(source)).name.split(".")[0].strip("*?[]{} ") or "run"
    output, number = Path("outputs") / name, 1
    while output.exists() or output.is_symlink():
        number += 1
        output = Path("outputs") / f"{name}-{number}"
    return str(output)


def _write(path: Path, made: MadeRecipe) -> None:
    """Check that the text reads back as the recipe that was chosen, and write it as a new file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "recipe.yaml"
        copy.write_text(made.text, encoding="utf-8")
        load_recipe(copy)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(made.text)
    except FileExistsError:
        raise UserError(path, "this file exists, and is not replaced", _ANOTHER_FILE) from None
    except OSError as error:
        raise UserError(path, f"the recipe cannot be written ({error.strerror})", _OWN_FOLDER) from None


# --- the entries ------------------------------------------------------------------------------------------


def _first_entries(found: Found, parameters: int, output: str) -> list[Entry]:
    options = found.options
    default = " It is the default of init, and small enough for a CPU." if options.model == "smollm2-135m" else ""
    entries = [
        Entry(
            "model", _path_in_recipe(options.model, options.output_recipe),
            f"{count_text(parameters)} parameters, {found.family}, {_context_text(found.context)}.{default} "
            "Alternative: a hub id such as HuggingFaceTB/SmolLM2-360M-Instruct, a folder or a .gguf file; run init "
            "again with --model, since other values depend on the model.",
        ),
        Entry("output", output, "Everything that the run writes. Another value trains beside it."),
    ]  # fmt: skip
    if options.trust_remote_code:
        entries.append(Entry("trust_remote_code", True, "Your consent, given with --trust-remote-code."))
    return entries


def _data_entries(found: Found, max_length: Choice, test_fraction: Choice) -> list[Entry]:
    options, rows = found.options, found.rows
    source = options.source
    listed = [_path_in_recipe(one, options.output_recipe) for one in (source if isinstance(source, list) else [source])]
    formats = list(dict.fromkeys(rows.formats))
    entries = [
        Entry(
            "data.source", listed if isinstance(source, list) else listed[0],
            "A path is looked up from the current folder, then from the folder of this file.",
        )
    ]  # fmt: skip
    if len(formats) == 1:
        entries.append(Entry("data.format", formats[0], "Found in the rows. Alternative: auto finds it each time."))
    entries.append(Entry("data.template", found.template, _template_reason(found)))
    entries.append(Entry("data.max_length", max_length.value, max_length.reason))
    if rows.problems:
        share = percent(rows.problems.total() / rows.parsed)
        reasons = ", ".join(f"{name} {number:,}" for name, number in rows.problems.most_common())
        repairs = ", ".join(f"{name} {number:,}" for name, number in rows.repairs.most_common())
        if rows.repairable:
            why = f"repair keeps {rows.repairable:,} of them ({repairs}); skip would leave all of them out"
        else:
            why = "none of them can be repaired, and skip leaves them out"
        entries.append(
            Entry(
                "data.invalid",
                "repair" if rows.repairable else "skip",
                f"{share} of the rows are no conversation as they stand ({reasons}): {why}. Both count every row in "
                "dataset/ledger.json. Alternative: error, and correct the data.",
            )
        )
    elif found.tokens.refused:
        why = f"The template cannot write {found.tokens.refused:,} of the sample. Alternative: another data.template."
        entries.append(Entry("data.invalid", "skip", why))
    fraction = test_fraction.reason
    if repeated := rows.duplicates + rows.near_duplicates:
        fraction += (
            f" {repeated:,} conversations repeat another one or nearly do; where such a pair is divided between "
            "training and test, the scores are too good."
        )
    entries.append(Entry("data.test_fraction", test_fraction.value, fraction))
    if rows.usable > 2 * _FIRST_ROWS:
        why = "For a first run that takes minutes, read only the first rows:"
        entries.append(Entry("data.limit", _FIRST_ROWS, why, as_comment=True))
    return entries


def _training_entries(
    recipe: Recipe, epochs: Choice, batch: BatchChoice, rate: Choice, memory_reason: str, keep: int | None
) -> list[Entry]:
    training = recipe.training
    several = " Every strategy takes the same steps." if training.processes > 1 else ""
    entries = [
        Entry(
            "training.strategy", training.strategy,
            f"Planned: {memory_reason}.{several} Alternative: auto plans and tries it when training starts.",
        )
    ]  # fmt: skip
    if training.processes > 1:
        entries.append(Entry("training.processes", training.processes, "One process for each GPU."))
    if training.gradient_checkpointing:
        why = "Activations are computed again in the backward pass: less memory, about a third more time."
        entries.append(Entry("training.gradient_checkpointing", True, why))
    if training.lora is not None:
        why = (
            "Adapters beside frozen weights, since training all weights does not fit (see strategy). rank 16 and alpha "
            "32 are the defaults. Alternative: {rank: 64, alpha: 128} learns more, at little memory."
        )
        entries.append(Entry("training.lora", {"rank": training.lora.rank, "alpha": round(training.lora.alpha)}, why))
    entries.append(Entry("training.epochs", epochs.value, epochs.reason))
    entries.append(Entry("training.batch_size", training.batch_size, batch.reason))
    if training.gradient_accumulation > 1:
        why = "Micro-steps of an optimizer step."
        entries.append(Entry("training.gradient_accumulation", training.gradient_accumulation, why))
    entries.append(Entry("training.learning_rate", rate.value, rate.reason))
    if recipe.data.test_fraction > 0:
        why = "The held-out loss after each epoch, in the log and on the page. Alternative: null saves that time."
        entries.append(Entry("training.eval_every", "epoch", why))
    if keep is not None:
        why = "The disk has no room for all checkpoints; the newest and the best ones are kept."
        entries.append(Entry("training.keep_checkpoints", keep, why))
    return entries


def _evaluation_entries(evaluation: EvaluationChoice, new_tokens: Choice) -> list[Entry]:
    return [
        Entry("evaluation.turns", evaluation.turns.value, evaluation.turns.reason),
        Entry("evaluation.max_new_tokens", new_tokens.value, new_tokens.reason),
        Entry("evaluation.limit", evaluation.limit.value, evaluation.limit.reason),
    ]


def _path_in_recipe(value: Any, recipe: Path) -> Any:
    """Return a path as the user wrote it, or absolute where the recipe is in another folder than the current one."""
    if not isinstance(value, str) or recipe.absolute().parent == Path.cwd():
        return value
    path = expand_user_path(value)
    return str(path.absolute()) if path.exists() or "*" in value else value


# --- texts ------------------------------------------------------------------------------------------------


def _template_reason(found: Found) -> str:
    stops = ", ".join(found.tokens.stop_tokens)
    if found.own_template:
        return f"The model's own template, in which it was tuned; an answer ends with {stops}."
    return (
        f"The model has no template of its own that can write these conversations; an answer ends with {stops}. "
        "Alternatives: mistral, llama3, zephyr, or a .jinja file."
    )


def _template_text(found: Found) -> str:
    return "with a template of its own" if found.own_template else f"no template of its own, {found.template} is used"


def _context_text(context: int | None) -> str:
    return "context unknown" if context is None else f"context {context:,}"


def _machine_text(job: Job, options: InitOptions) -> str:
    machine: Machine = job.machine
    where = "this machine" if options.gpu is None else "another machine"
    return (
        f"{where}: {job.processes} x {machine.name}, {gigabytes(machine.memory)} usable each, {job.precision} "
        f"({machine.source})"
    )


def _cost_text(recipe: Recipe, prediction: Prediction, evaluation: EvaluationChoice) -> str:
    training_time = "?" if prediction.total_seconds is None else duration(prediction.total_seconds)
    return (
        f"{recipe.training.strategy}: {gigabytes(needed_bytes(prediction))} of memory for each process, "
        f"{training_time} of training in {prediction.steps or 0:,} steps, about {duration(evaluation.seconds)} of "
        "evaluation"
    )


def _warnings(found: Found, recipe: Recipe, prediction: Prediction, job: Job) -> tuple[str, ...]:
    rows, tokens = found.rows, found.tokens
    warnings = []
    if not prediction.fits:
        fixes = "; ".join((*make_plan(recipe, job).suggestions, "a smaller --model, or another machine with --gpu"))
        warnings.append(f"this recipe does not fit the machine. What would fit: {fixes}")
    if dropped := tokens.stats.count("findings", "reasoning_dropped"):
        warnings.append(
            f"{dropped:,} of the sample hold reasoning that the template {tokens.template} does not write: it is not "
            "learned (see data.template)"
        )
    script = next(iter(tokens.scripts), "latin")
    per_character = tokens.lengths.sum() / max(1, tokens.characters)
    if per_character > 1:
        warnings.append(
            f"the tokenizer needs {per_character:.1f} tokens for each character of this text ({script} script): the "
            "model has hardly seen it, and one that knows the language learns far more"
        )
    if rows.duplicates + rows.near_duplicates > 0.2 * rows.parsed:
        warnings.append(
            f"{rows.duplicates + rows.near_duplicates:,} of {rows.parsed:,} conversations repeat another one or nearly "
            "do: remove them, or give test data of your own as data.test"
        )
    if rows.parsed >= MOST_PARSED and not rows.all_read:
        warnings.append(f"only the first {rows.parsed:,} rows of the hub's data were read; there may be more")
    return tuple(warnings)


def _next_commands(recipe_path: Path, recipe: Recipe) -> Sequence[str]:
    output = recipe.output
    return (f"  minisft train {recipe_path}", f"  minisft evaluate {output}", f"  minisft report {output}")
