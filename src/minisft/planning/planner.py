"""The plan of a recipe: the job it describes, every setting that could train it, and which one to take."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.data.preparation import prepare
from minisft.errors import UserError
from minisft.models import resolve_model
from minisft.planning.machines import (
    Machine,
    cpu_precision,
    load_of_machine,
    machine_named,
    require_count,
    with_layer_benchmark,
)
from minisft.planning.memory import ZERO, kept_logit_bytes, token_bytes
from minisft.planning.model_cost import ModelCosts, read_config
from minisft.planning.prediction import Job, Prediction, predict
from minisft.planning.workload import Workload, workload_assumed, workload_of
from minisft.recipe import STRATEGIES, LoraRecipe, Recipe
from minisft.run_folder import RunFolder, is_same_run
from minisft.run_start import open_run
from minisft.training.batching import Sizes
from minisft.training.device import default_tokens_per_forward
from minisft.training.optimization import bytes_of_states

if TYPE_CHECKING:
    from minisft.planning.prediction import Prediction
    from minisft.recipe import Recipe


# A setting that is faster by less than this is not worth being less simple: no prediction is much more exact.
_WORTH = 0.1
_MOST_PROCESSES = 256  # that a remedy may ask for
_LORA = LoraRecipe()  # the adapters of the grid, where the recipe has none of its own


@dataclass(frozen=True)
class Plan:
    """What `minisft plan` says.

    Attributes:
        recipe: that is planned.
        job: model, machine and work.
        rows: the recipe's own setting under every strategy, then with offload.
        grid: every strategy and offload, with and without checkpointing and LoRA.
        chosen: the cheapest of `rows` that fits and can be trained here; None: none does.
        reason: why, in a sentence.
        suggestions: what would fit, where nothing does.
        largest_row: tokens of the longest row that fits under the chosen strategy, else under ZeRO-3; 0: none.
        notes: what the user should know of how this came about.
    """

    recipe: Recipe
    job: Job
    rows: tuple[Prediction, ...]
    grid: tuple[Prediction, ...]
    chosen: Prediction | None
    reason: str
    suggestions: tuple[str, ...]
    largest_row: int
    notes: tuple[str, ...]


def predict_here(recipe: Recipe) -> Prediction:
    """Predict a recipe, whose data is prepared, on this machine.

    Raises:
        UserError: the data is not prepared, or the model's configuration does not do.
    """
    job = job_of(
        recipe, machine_named(None, recipe.training.processes, recipe.training.precision), sizes=prepared_sizes(recipe)
    )
    if recipe.training.strategy != "auto":
        return predict_recipe(recipe, job)
    predictions = [predict_recipe(recipe, job, strategy) for strategy in STRATEGIES]
    return choose(predictions)[0] or predictions[-1]


def predict_recipe(recipe: Recipe, job: Job, strategy: str | None = None) -> Prediction:
    """Predict a recipe's own setting, under its strategy or another."""
    training = recipe.training
    strategy = strategy or training.strategy
    return predict(
        job, strategy, checkpointing=training.gradient_checkpointing, lora=training.lora,
        offload=training.offload is not None and strategy in ZERO,
    )  # fmt: skip


def prepared_sizes(recipe: Recipe) -> Sizes:
    """Read the lengths of a run's prepared training data.

    Raises:
        UserError: it is not prepared.
    """
    from minisft.data.prepared import load_train
    from minisft.training.batching import measure_lengths

    return measure_lengths(load_train(recipe.output))


def job_of(recipe: Recipe, machine: Machine, *, sizes: Sizes | None, count: int | None = None, nodes: int = 1) -> Job:
    """Bring together what planning needs.

    Args:
        recipe: whose model is read, as a configuration only.
        machine: for each process; the CPU at hand gets the rate at which it trains layers of the model.
        sizes: of the training data; None: assumed.
        count: processes of a node; None: the recipe's.
        nodes: machines.

    Raises:
        UserError: there is no such model, or its configuration lacks a field.
    """
    training = recipe.training
    per_node = count or training.processes
    processes = per_node * nodes
    config, precision = config_of(recipe), _precision(training.precision, machine)
    if machine.measured:
        machine = with_layer_benchmark(machine, config, precision, per_node)
    row_tokens = training.row_tokens or default_tokens_per_forward(machine.kind == "cpu")
    return Job(
        model=ModelCosts(config),
        machine=machine,
        processes=processes,
        nodes=nodes,
        precision=precision,
        workload=_workload(recipe, config, sizes, row_tokens, processes),
        row_tokens=row_tokens,
        optimizer_bytes=bytes_of_states(training.optimizer),
    )


def config_of(recipe: Recipe) -> Any:
    """Read the configuration of a recipe's model.

    Raises:
        UserError: there is no such model, or its configuration lacks a field.
    """
    folder = resolve_model(recipe.model, recipe.trust_remote_code, weights=False).folder
    return read_config(folder, recipe.trust_remote_code)


def _workload(recipe: Recipe, config: Any, sizes: Sizes | None, row_tokens: int, processes: int) -> Workload:
    training = recipe.training
    if sizes is not None:
        return workload_of(sizes, recipe, row_tokens=row_tokens, processes=processes)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or recipe.data.max_length
    length = min(recipe.data.max_length, limit)
    return workload_assumed(training, row_tokens=row_tokens, processes=processes, length=length)


def _precision(asked: str, machine: Machine) -> str:
    if machine.kind == "cpu":
        return cpu_precision(asked)
    return "bf16" if asked == "auto" else asked


# --- the plan ---------------------------------------------------------------------------------------------


def make_plan(recipe: Recipe, job: Job, notes: tuple[str, ...] = ()) -> Plan:
    """Predict every setting and choose."""
    training = recipe.training
    rows = tuple(_under_every_strategy(job, checkpointing=training.gradient_checkpointing, lora=training.lora))
    trainable = [row for row in rows if row.setting.offload == (training.offload is not None)]
    chosen, reason = choose(trainable)
    return Plan(
        recipe=recipe,
        job=job,
        rows=rows,
        grid=tuple(_grid(recipe, job)),
        chosen=chosen,
        reason=reason,
        suggestions=() if chosen else tuple(suggestions(recipe, job)),
        largest_row=largest_row(job, chosen or trainable[-1]),
        notes=notes,
    )


def _under_every_strategy(job: Job, *, checkpointing: bool, lora: LoraRecipe | None) -> Iterator[Prediction]:
    for strategy in STRATEGIES:
        yield predict(job, strategy, checkpointing=checkpointing, lora=lora)
    for strategy in ZERO if job.machine.kind == "gpu" else ():  # a CPU has no other memory
        yield predict(job, strategy, checkpointing=checkpointing, lora=lora, offload=True)


def _grid(recipe: Recipe, job: Job) -> Iterator[Prediction]:
    for lora in (None, recipe.training.lora or _LORA):
        for checkpointing in (False, True):
            yield from _under_every_strategy(job, checkpointing=checkpointing, lora=lora)


def choose(rows: list[Prediction]) -> tuple[Prediction | None, str]:
    """Return the cheapest prediction that fits, the simplest of equals, and why; `rows` in order of simplicity."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        least = min(rows, key=lambda row: row.memory.peak)
        needed, select_kernel = gigabytes(needed_bytes(least)), gigabytes(least.usable_bytes)
        return None, f"nothing fits: {_name(least)} needs least, {needed}, and {select_kernel} are usable"
    fastest = min(row.step_seconds for row in fitting)
    chosen = next(row for row in fitting if row.step_seconds <= fastest * (1 + _WORTH))
    simpler = rows[: rows.index(chosen)]
    too_large = [row for row in simpler if not row.fits]
    slower = [row for row in simpler if row.fits] + [row for row in fitting if rows.index(row) > rows.index(chosen)]
    reason = f"{_name(chosen)} fits, {gigabytes(needed_bytes(chosen))} of {gigabytes(chosen.usable_bytes)} usable"
    if too_large:
        reason += "; " + ", ".join(f"{_name(row)} would need {gigabytes(needed_bytes(row))}" for row in too_large)
    if slower:
        others = [f"{_name(row)} {row.step_seconds / chosen.step_seconds - 1:+.0%}" for row in slower]
        reason += f"; of a step's time, by the plan, {', '.join(others)}"
    return chosen, reason


def suggestions(recipe: Recipe, job: Job) -> Iterator[str]:
    """Say which single changes of the recipe, or which machines, would fit; the cheapest first."""
    training = recipe.training
    lora, checkpointing = training.lora, training.gradient_checkpointing
    if not checkpointing and (name := _first_fit(job, lora=lora, checkpointing=True)):
        yield f"training.gradient_checkpointing=true with training.strategy={name}"
    for row_tokens in _smaller_rows(job):
        row = (row_tokens, _supervised_of(job, row_tokens))
        if name := _first_fit(job, lora=lora, checkpointing=checkpointing, row=row):
            yield f"training.row_tokens={row_tokens} with training.strategy={name}"
            break
    if lora is None:
        for tried in (checkpointing, True):
            if name := _first_fit(job, lora=_LORA, checkpointing=tried):
                more = " training.gradient_checkpointing=true" if tried and not checkpointing else ""
                yield f"training.lora={{rank: {_LORA.rank}}}{more} with training.strategy={name}"
                break
    yield from _more_machines(job, lora, checkpointing)
    if job.machine.kind == "cpu":
        least = min((predict_recipe(recipe, job, strategy) for strategy in STRATEGIES), key=needed_bytes)
        yield f"{gigabytes(needed_bytes(least))} for each process, with training.strategy={least.setting.strategy}"
        return
    for strategy in ZERO:
        if predict(job, strategy, lora=lora, checkpointing=True, offload=True).fits:
            yield f"training.strategy={strategy} training.gradient_checkpointing=true training.offload=optimizer"
            break


def _more_machines(job: Job, lora: LoraRecipe | None, checkpointing: bool) -> Iterator[str]:
    """Say how many machines would do, as the recipe is, and how many with checkpointing where those are fewer."""
    if job.machine.kind == "cpu":
        return
    before = _MOST_PROCESSES + 1
    for tried in dict.fromkeys((checkpointing, True)):
        processes, name = _fewest_processes(job, lora, tried)
        if name is None or processes >= before:
            continue
        before = processes
        nodes = -(-processes // job.machine.per_node)
        more = " training.gradient_checkpointing=true" if tried and not checkpointing else ""
        where = f" on {nodes} nodes" if nodes > 1 else ""
        yield f"{processes} {job.machine.name}{where} with training.strategy={name}{more}"


def _fewest_processes(job: Job, lora: LoraRecipe | None, checkpointing: bool) -> tuple[int, str | None]:
    processes = job.processes
    while (processes := 1 << processes.bit_length()) <= _MOST_PROCESSES:  # the next power of two
        nodes = -(-processes // job.machine.per_node)
        larger = replace(job, processes=processes, nodes=nodes)
        if name := _first_fit(larger, lora=lora, checkpointing=checkpointing):
            return processes, name
    return processes, None


def _first_fit(job: Job, **setting: Any) -> str | None:
    return next((name for name in STRATEGIES if predict(job, name, **setting).fits), None)


def _smaller_rows(job: Job) -> Iterator[int]:
    """Halve the row; it cannot be shorter than the longest conversation."""
    size = job.row_tokens // 2
    while size >= job.workload.longest:
        yield size
        size //= 2


def _supervised_of(job: Job, tokens: int) -> int:
    """Supervised tokens of a row of so many tokens, at the share of the workload's rows."""
    share = job.workload.row_supervised.sum() / job.workload.row_tokens.sum()
    return round(tokens * share)


def largest_row(job: Job, prediction: Prediction) -> int:
    """Return the tokens of the longest row that fits, rounded down to 64; 0 where none does.

    Memory grows linearly with the tokens of a row, so two predictions give all.
    """
    setting = prediction.setting
    cost = job.cost(setting.strategy, setting.lora)
    share = _supervised_of(job, 1_000_000) / 1_000_000
    per_token = token_bytes(cost, setting)
    per_token += share * kept_logit_bytes(cost, setting)
    many = 1 << 24  # where activations decide the peak
    huge = predict(
        job, setting.strategy, checkpointing=setting.checkpointing, lora=setting.lora, row=(many, round(many * share))
    )
    left = prediction.usable_bytes - prediction.process_bytes - (huge.memory.peak - many * per_token)
    return max(0, int(left / per_token) // 64 * 64)


def _name(prediction: Prediction) -> str:
    return prediction.setting.strategy + (" with offload" if prediction.setting.offload else "")


def needed_bytes(prediction: Prediction) -> float:
    return prediction.memory.peak + prediction.process_bytes


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


@dataclass(frozen=True)
class PlanOptions:
    """What the command line asked for; None: this machine, and the recipe's processes."""

    gpu: str | None
    count: int | None
    nodes: int


def plan_for(recipe: Recipe, options: PlanOptions) -> Plan:
    """Plan a recipe for a machine.

    Raises:
        UserError: no such machine, an impossible count, or a model's configuration that does not do.
    """
    count = recipe.training.processes if options.count is None else options.count
    machine = limited(machine_named(options.gpu, max(count, 1), recipe.training.precision), recipe)
    require_count(machine, count, options.nodes)
    config_of(recipe)  # before anything is prepared
    sizes, notes = _sizes(recipe)
    if machine.kind == "cpu" and (busy := load_of_machine()) > machine.per_node / 2:
        notes += (f"others are at work (load {busy:.1f} on {machine.per_node} cores): an idle machine is faster",)
    job = job_of(recipe, machine, sizes=sizes, count=count, nodes=options.nodes)
    return make_plan(recipe, job, notes)


def limited(machine: Machine, recipe: Recipe) -> Machine:
    """Return the machine with no more memory than the recipe allows a process."""
    limit = recipe.training.memory_limit_gb
    return machine if limit is None else replace(machine, memory=limit * 1e9)


def _sizes(recipe: Recipe) -> tuple[Sizes | None, tuple[str, ...]]:
    """Return the data's lengths, preparing it where needed; None, and a note why, where it cannot be prepared."""
    try:
        run = RunFolder(Path(recipe.output))
        if not (is_same_run(run, recipe) and run.has_begun()):
            with open_run(recipe, prepares_only=True):
                prepared = prepare(recipe)
            notes = () if prepared.cached else (f"prepared {prepared.train_rows:,} conversations in {prepared.folder}",)
            return prepared_sizes(recipe), notes
        return prepared_sizes(recipe), ()
    except UserError as error:
        assumed = "full rows and half of the tokens supervised are assumed, and the run's length is unknown"
        return None, (f"the data is not prepared ({error.where}: {error.problem}): {assumed}",)


def predict_run(recipe: "Recipe") -> "Prediction":
    """Predict memory and time of a recipe on this machine, as it stands; its data must be prepared.

    Raises:
        UserError: the data is not prepared, or the model's configuration does not do.
    """
    return predict_here(recipe)
