"""What `init` found and chose, as the lines that it prints and as the entries of the recipe."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minisft.files import expand_user_path, is_pattern
from minisft.new_recipe.choices import BatchChoice, Choice, EvaluationChoice, HeldOutChoice, count_text, percent
from minisft.new_recipe.data_survey import RowSurvey, TokenSurvey
from minisft.new_recipe.machine_fit import FittedRun
from minisft.new_recipe.recipe_text import Entry
from minisft.planning.machines import load_of_machine
from minisft.planning.plan_table import duration
from minisft.planning.planner import gigabytes, make_plan, needed_bytes
from minisft.recipe import BUILT_IN_MODELS

FIRST_ROWS = 400  # of a first look at what the model learns
_MANY_REPEATED = 0.2  # share of the conversations from which repeated ones are a warning
_LONG = 1800.0  # seconds of training from which a first look is proposed


@dataclass(frozen=True)
class Found:
    """What `init` found out about data and model, before anything is chosen.

    Args:
        source: Value of the recipe's key `data.source`.
        data_name: Names of the sources.
        model: Value of the recipe's key `model`.
        rows: What the rows hold.
        tokens: The sample in the model's tokens.
        template: Value of the recipe's key `data.template`.
        own_template: Whether the model has a template of its own.
        family: The model's type, such as llama.
        context: Largest number of tokens that the model takes; None where its configuration does not say.
    """

    source: Any
    data_name: str
    model: str
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


@dataclass(frozen=True)
class Chosen:
    """All values that `init` chooses, each with its reason.

    Args:
        run: The training in the form that fits the machine, with all of its values.
        keep_checkpoints: Number of checkpoints to keep; None: all.
        disk: How much disk the run needs, as text.
    """

    max_length: Choice
    held_out: HeldOutChoice
    epochs: Choice
    batch: BatchChoice
    run: FittedRun
    learning_rate: Choice
    max_new_tokens: Choice
    evaluation: EvaluationChoice
    keep_checkpoints: int | None
    disk: str


# --- lines ------------------------------------------------------------------------------------------------


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


def cost_lines(found: Found, chosen: Chosen, gpu: str | None) -> list[str]:
    """Return model, machine and cost as lines of the same table."""
    run, recipe = chosen.run, chosen.run.recipe
    machine, prediction = run.job.machine, run.prediction
    template = "with a template of its own" if found.own_template else f"the template {found.template} is used"
    where = "this machine" if gpu is None else "another machine"
    time = "?" if prediction.total_seconds is None else duration(prediction.total_seconds)
    return [
        f"model      {found.model}: {count_text(run.parameters)} parameters, {found.family}, {_context(found)}, "
        f"{template}",
        f"machine    {where}: {run.job.processes} x {machine.name}, {gigabytes(machine.memory)} usable each, "
        f"{run.job.precision} ({machine.source})",
        f"cost       {recipe.training.strategy}: {gigabytes(needed_bytes(prediction))} of memory for each process, "
        f"{time} of training in {prediction.steps or 0:,} steps, about {duration(chosen.evaluation.seconds)} of "
        f"evaluation; {chosen.disk}",
    ]


def warnings_of(found: Found, chosen: Chosen) -> list[str]:
    """Return what the user should know before training."""
    rows, tokens, run = found.rows, found.tokens, chosen.run
    warnings = []
    if not run.prediction.fits:
        fixes = [*make_plan(run.recipe, run.job).suggestions, "a smaller --model", "another machine with --gpu"]
        warnings.append(f"this recipe does not fit the machine. What would fit: {'; '.join(fixes)}")
    if not chosen.held_out.conversations:
        warnings.append("no conversation can be held out, and nothing can be scored: give held-out data as data.test")
    if dropped := tokens.stats.count("findings", "reasoning_dropped"):
        warnings.append(
            f"{dropped:,} of the sample hold reasoning that the template does not write: it is not learned (see "
            "data.template)"
        )
    machine = run.job.machine
    if machine.measured and (load := load_of_machine()) > machine.per_node / 2:
        warnings.append(
            f"other programs are running (load {load:.1f} on {machine.per_node} cores), and the times are those of a "
            "busy machine"
        )
    if tokens.per_character > 1:
        script = next(iter(tokens.scripts), "unknown")
        warnings.append(
            f"the tokenizer needs {tokens.per_character:.1f} tokens for each character of the answers (script: "
            f"{script}): the model has hardly seen such text, and one that knows the language learns far more"
        )
    repeated = rows.duplicates + rows.near_duplicates
    if repeated > _MANY_REPEATED * rows.parsed:
        warnings.append(
            f"{repeated:,} of {rows.parsed:,} conversations repeat another one or nearly do: remove them, or give test "
            "data of your own as data.test"
        )
    return warnings


def next_commands(chosen: Chosen, path: Path) -> list[str]:
    """Return the commands to go on with; a text that begins with spaces is a command."""
    folder = shlex.quote(chosen.run.recipe.output)
    verbs = ("evaluate", "report") if chosen.held_out.conversations else ("report", "chat")
    return [f"  minisft train {shlex.quote(str(path))}", *(f"  minisft {verb} {folder}" for verb in verbs)]


def first_look(found: Found, chosen: Chosen, path: Path) -> list[str]:
    """Return a command that trains on the first rows, where the training is long."""
    seconds, output = chosen.run.training_seconds, chosen.run.recipe.output
    if seconds <= _LONG or found.rows.usable <= 2 * FIRST_ROWS:
        return []
    single = "training.gradient_accumulation=1 " if chosen.batch.accumulation > 1 else ""
    about = duration(seconds * FIRST_ROWS / found.rows.usable)
    return [
        f"a first look, in about {about}:",
        f"  minisft train {shlex.quote(str(path))} data.limit={FIRST_ROWS} {single}output={shlex.quote(output)}-first",
    ]


# --- entries ----------------------------------------------------------------------------------------------


def recipe_entries(found: Found, chosen: Chosen, path: Path) -> list[Entry]:
    """Return the entries of the recipe, in the order of its sections."""
    evaluation = chosen.evaluation
    return [
        *_first_entries(found, chosen, path),
        *_data_entries(found, chosen, path),
        *_training_entries(chosen),
        Entry("evaluation.turns", evaluation.turns.value, evaluation.turns.reason),
        Entry("evaluation.max_new_tokens", chosen.max_new_tokens.value, chosen.max_new_tokens.reason),
        Entry("evaluation.limit", evaluation.limit.value, evaluation.limit.reason),
    ]


def _first_entries(found: Found, chosen: Chosen, path: Path) -> list[Entry]:
    recipe = chosen.run.recipe
    default = " It is the default of init, and small enough for a CPU." if found.model in BUILT_IN_MODELS else ""
    entries = [
        Entry(
            "model", _path_in_recipe(found.model, path),
            f"{count_text(chosen.run.parameters)} parameters, {found.family}, {_context(found)}.{default} Alternative: "
            "a hub id such as HuggingFaceTB/SmolLM2-360M-Instruct, a folder or a .gguf file. Run init again with "
            "--model, since other values depend on the model.",
        ),
        Entry("output", recipe.output, "The folder that the run writes. Another value trains beside it."),
    ]  # fmt: skip
    if recipe.trust_remote_code:
        entries.append(Entry("trust_remote_code", True, "Your consent, given with --trust-remote-code."))
    return entries


def _data_entries(found: Found, chosen: Chosen, path: Path) -> list[Entry]:
    rows, tokens = found.rows, found.tokens
    stops = ", ".join(tokens.stop_tokens)
    template = f"The model's own template, in which it was tuned; an answer ends with {stops}."
    if not found.own_template:
        template = (
            f"The model has no template of its own that can write these conversations; an answer ends with {stops}. "
            "Alternatives: mistral, llama3, zephyr, or a .jinja file."
        )
    fraction = chosen.held_out.reason
    repeated = rows.duplicates + rows.near_duplicates
    if repeated and chosen.held_out.conversations:
        fraction += (
            f" {repeated:,} conversations repeat another one or nearly do; where such a pair is divided between "
            "training and test, the scores are too good."
        )
    entries = [
        Entry(
            "data.source", _path_in_recipe(found.source, path),
            "A path is looked up from the current folder, then from the folder of this file.",
        ),
        Entry("data.template", found.template, template),
        Entry("data.max_length", chosen.max_length.value, chosen.max_length.reason),
        *_invalid_entry(found),
        Entry("data.test_fraction", chosen.held_out.fraction, fraction),
    ]  # fmt: skip
    if len(formats := set(rows.formats)) == 1:
        why = "Found in the rows. Alternative: auto finds it each time."
        entries.insert(1, Entry("data.format", formats.pop(), why))
    if rows.usable > 2 * FIRST_ROWS:
        why = "For a first run that takes minutes, read only the first rows:"
        entries.append(Entry("data.limit", FIRST_ROWS, why, as_comment=True))
    return entries


def _invalid_entry(found: Found) -> list[Entry]:
    """Return `data.invalid` where rows cannot be used as they stand."""
    rows, refused = found.rows, found.tokens.refused
    if not rows.problems:
        if not refused:
            return []
        why = f"The template cannot write {refused:,} of the sample. Alternative: another data.template."
        return [Entry("data.invalid", "skip", why)]
    if rows.repairable:
        value = "repair"
        repairs = ", ".join(f"{name} {number:,}" for name, number in rows.repairs.most_common())
        why = f"repair keeps {rows.repairable:,} of them ({repairs}), and skip would leave all of them out"
    else:
        value, why = "skip", "none of them can be repaired, and skip leaves them out"
    reasons = ", ".join(f"{name} {number:,}" for name, number in rows.problems.most_common())
    share = percent(rows.problems.total() / rows.parsed)
    return [
        Entry(
            "data.invalid", value,
            f"{share} of the rows are no conversation as they stand ({reasons}): {why}. Every row is counted in "
            "dataset/ledger.json. Alternative: error, and correct the data.",
        )
    ]  # fmt: skip


def _training_entries(chosen: Chosen) -> list[Entry]:
    training = chosen.run.recipe.training
    several = " Every strategy takes the same steps." if training.processes > 1 else ""
    entries = [
        Entry(
            "training.strategy", training.strategy,
            f"Planned: {chosen.run.reason}.{several} Alternative: auto plans and tries it when training starts.",
        )
    ]  # fmt: skip
    if training.processes > 1:
        why = "One process for each GPU, or as many as --count says."
        entries.append(Entry("training.processes", training.processes, why))
    if training.gradient_checkpointing:
        why = "Activations are computed again in the backward pass: less memory, about a third more time."
        entries.append(Entry("training.gradient_checkpointing", True, why))
    if training.lora is not None:
        why = (
            "Adapters beside frozen weights, since training all weights does not fit (see strategy). rank 16 and alpha "
            "32 are the defaults. Alternative: {rank: 64, alpha: 128} learns more, at little memory."
        )
        entries.append(Entry("training.lora", {"rank": training.lora.rank, "alpha": round(training.lora.alpha)}, why))
    entries.append(Entry("training.epochs", chosen.epochs.value, chosen.epochs.reason))
    entries.append(Entry("training.batch_size", chosen.batch.batch_size, chosen.batch.reason))
    if chosen.batch.accumulation > 1:
        why = "Micro-steps of an optimizer step."
        entries.append(Entry("training.gradient_accumulation", chosen.batch.accumulation, why))
    entries.append(Entry("training.learning_rate", chosen.learning_rate.value, chosen.learning_rate.reason))
    if chosen.held_out.conversations:
        why = "The held-out loss after each epoch, in the log and on the page. Alternative: null saves that time."
        entries.append(Entry("training.eval_every", "epoch", why))
    if chosen.keep_checkpoints is not None:
        why = "The disk has no room for all checkpoints; the newest and the best ones are kept."
        entries.append(Entry("training.keep_checkpoints", chosen.keep_checkpoints, why))
    return entries


def _path_in_recipe(value: Any, recipe: Path) -> Any:
    """Return paths as the user wrote them, or absolute where the recipe is in another folder than the current one."""
    if isinstance(value, list):
        return [_path_in_recipe(one, recipe) for one in value]
    if isinstance(value, dict):
        return {key: _path_in_recipe(one, recipe) if key == "path" else one for key, one in value.items()}
    if not isinstance(value, str) or recipe.absolute().parent == Path.cwd():
        return value
    path = expand_user_path(value)
    return str(path.absolute()) if path.exists() or is_pattern(path) else value


def _context(found: Found) -> str:
    return "context unknown" if found.context is None else f"context {found.context:,}"
