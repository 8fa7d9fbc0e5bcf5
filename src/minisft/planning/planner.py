"""The plan of a recipe: the job it describes, a prediction for every setting, and the choice among them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisft.data.preparation import prepare
from minisft.errors import UserError
from minisft.models import resolve_model
from minisft.planning.dry_run import DryRun, dry_run, require_gpu
from minisft.planning.liger_memory import MODEL_TYPES as LIGER_MODEL_TYPES
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
from minisft.planning.workload import workload_assumed, workload_of
from minisft.recipe import STRATEGIES, LoraRecipe, Recipe
from minisft.run_folder import RunFolder, is_same_run, trained_alone
from minisft.run_start import open_run
from minisft.training.batching import Sizes
from minisft.training.device import default_tokens_per_forward
from minisft.training.kernels import find_obstacle
from minisft.training.optimization import bytes_of_states

# Share by which a setting must be faster to be chosen over a simpler one: predictions are hardly more exact.
_WORTHWHILE_SPEEDUP = 0.1
_MOST_PROCESSES = 256  # that a suggestion may ask for
_LORA = LoraRecipe()  # adapters of the grid and of suggestions, where the recipe has none


@dataclass(frozen=True)
class Plan:
    """The result of `minisft plan`.

    Attributes:
        recipe: The recipe that is planned.
        job: Model, machine and work.
        rows: The recipe's own setting under every strategy, then with offload.
        grid: Every strategy and offload, with and without checkpointing and LoRA.
        chosen: The cheapest of `rows` that fits and has the recipe's offload; None where none fits.
        reason: Why it is chosen, in one sentence.
        suggestions: Changes that would fit, where nothing fits.
        largest_row: Tokens of the longest row that fits under the chosen strategy, else under ZeRO-3; 0 for none.
        notes: Assumptions and conditions of the plan that the user should know.
        dry_run: What steps on GPUs that are not there showed; None where none were asked for.
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
    dry_run: DryRun | None = None


def predict_run(recipe: Recipe) -> Prediction:
    """Predict memory and time of a recipe, whose data is prepared, on this machine.

    Raises:
        UserError: The data is not prepared, or the model's configuration cannot be used.
    """
    job = job_of(
        recipe, machine_named(None, recipe.training.processes, recipe.training.precision), sizes=prepared_sizes(recipe)
    )
    if recipe.training.strategy != "auto":
        return predict_recipe(recipe, job)
    predictions = [predict_recipe(recipe, job, strategy) for strategy in STRATEGIES]
    return choose(predictions)[0] or predictions[-1]


def predict_recipe(recipe: Recipe, job: Job, strategy: str | None = None) -> Prediction:
    """Predict a recipe's own setting, under its own strategy or another one."""
    training = recipe.training
    strategy = strategy or training.strategy
    return predict(
        job, strategy, checkpointing=training.gradient_checkpointing, lora=training.lora,
        offload=training.offload is not None and strategy in ZERO,
    )  # fmt: skip


def prepared_sizes(recipe: Recipe) -> Sizes:
    """Read the lengths of a run's prepared training data.

    Raises:
        UserError: The data is not prepared.
    """
    from minisft.data.prepared import load_train
    from minisft.training.batching import measure_lengths

    return measure_lengths(load_train(recipe.output))


def job_of(recipe: Recipe, machine: Machine, *, sizes: Sizes | None, count: int | None = None, nodes: int = 1) -> Job:
    """Collect what a recipe trains: its model, machine, precision and work.

    Args:
        recipe: The recipe; of its model, only the configuration is read, and whether the last training in its output
            gave each conversation its own row.
        machine: Hardware of each process; this machine's CPU gets the rate at which it trains layers of the model.
        sizes: Lengths of the training data; None means that they are assumed.
        count: Number of processes of a node; None means the recipe's.
        nodes: Number of nodes.

    Raises:
        UserError: The model does not exist, or its configuration lacks a field.
    """
    training = recipe.training
    per_node = count or training.processes
    processes, shards = per_node * nodes, training.sequence_parallel
    if processes % shards:
        problem = f"{shards} does not divide the {processes} processes of the plan"
        raise UserError("training.sequence_parallel", problem, "change it, or --count")
    # 1. The model's configuration, and the precision on the machine.
    config = config_of(recipe)
    precision: str = training.precision
    if machine.kind == "cpu":
        precision = cpu_precision(precision)
    elif precision == "auto":
        precision = "bf16"
    # 2. The machine, with a speed measured on the model's own layers where possible.
    if machine.measured:
        machine = with_layer_benchmark(machine, config, precision, per_node, lora=training.lora)
    # 3. The work, counted from the data, or assumed with the longest conversations that data and model allow.
    row_tokens = training.row_tokens or default_tokens_per_forward(machine.kind == "cpu") * shards
    if trained_alone(RunFolder(Path(recipe.output)), recipe.model):
        row_tokens = 1
    if sizes is not None:
        workload = workload_of(sizes, recipe, row_tokens=row_tokens, processes=processes // shards)
    else:
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or recipe.data.max_length
        length = min(recipe.data.max_length, limit)
        workload = workload_assumed(training, row_tokens=row_tokens, processes=processes // shards, length=length)
    scored_tokens = 0
    if training.early_stopping_by == "best_by":
        scored_tokens = workload.longest + recipe.evaluation.max_new_tokens
    return Job(
        model=ModelCosts(config, liger=_has_liger(training.kernels, machine, config)),
        machine=machine,
        processes=processes,
        nodes=nodes,
        precision=precision,
        workload=workload.shared_by(shards),
        row_tokens=row_tokens,
        optimizer_bytes=bytes_of_states(training.optimizer),
        sequence_parallel=shards,
        scored_tokens=scored_tokens,
    )


def _has_liger(kernels: str, machine: Machine, config: Any) -> bool:
    """Return whether the model is counted with the kernels of Liger: named by the recipe, or found by `auto`."""
    if machine.kind == "cpu" or config.model_type not in LIGER_MODEL_TYPES:
        return False
    return kernels == "liger" or (kernels == "auto" and find_obstacle("liger", "vanilla", "cuda") is None)


def config_of(recipe: Recipe) -> Any:
    """Read the configuration of a recipe's model.

    Raises:
        UserError: The model does not exist, or its configuration lacks a field.
    """
    folder = resolve_model(recipe.model, recipe.trust_remote_code, weights=False).folder
    return read_config(folder, recipe.trust_remote_code)


# --- the plan ---------------------------------------------------------------------------------------------


def make_plan(recipe: Recipe, job: Job, notes: tuple[str, ...] = ()) -> Plan:
    """Predict every setting and choose the cheapest that fits."""
    training = recipe.training
    # 1. The recipe's own setting under every strategy, and the choice.
    rows = tuple(_under_every_strategy(job, checkpointing=training.gradient_checkpointing, lora=training.lora))
    trainable = [row for row in rows if row.setting.offload == (training.offload is not None)]
    chosen, reason = choose(trainable)
    # 2. The settings that the recipe could have instead.
    grid = [
        row
        for lora in (None, training.lora or _LORA)
        for checkpointing in (False, True)
        for row in _under_every_strategy(job, checkpointing=checkpointing, lora=lora)
    ]
    return Plan(
        recipe=recipe,
        job=job,
        rows=rows,
        grid=tuple(grid),
        chosen=chosen,
        reason=reason,
        suggestions=() if chosen else tuple(suggestions(recipe, job)),
        largest_row=largest_row(job, chosen or trainable[-1]),
        notes=notes,
    )


def _under_every_strategy(job: Job, *, checkpointing: bool, lora: LoraRecipe | None) -> Iterator[Prediction]:
    for strategy in STRATEGIES:
        yield predict(job, strategy, checkpointing=checkpointing, lora=lora)
    for strategy in ZERO if job.machine.kind == "gpu" else ():  # a CPU has no second memory
        yield predict(job, strategy, checkpointing=checkpointing, lora=lora, offload=True)


def choose(rows: list[Prediction]) -> tuple[Prediction | None, str]:
    """Return the simplest prediction that fits and is about as fast as the fastest, and the reason.

    Args:
        rows: Predictions in order of simplicity.

    Returns:
        The prediction and why it is chosen; None and what is missing where nothing fits.
    """
    # 1. Nothing fits.
    fitting = [row for row in rows if row.fits]
    if not fitting:
        least = min(rows, key=lambda row: row.memory.peak)
        needed, usable = gigabytes(needed_bytes(least)), gigabytes(least.usable_bytes)
        return None, f"nothing fits: {_name(least)} needs the least memory, {needed}, and {usable} are usable"
    # 2. The choice.
    fastest = min(row.step_seconds for row in fitting)
    chosen = next(row for row in fitting if row.step_seconds <= fastest * (1 + _WORTHWHILE_SPEEDUP))
    # 3. The reason: why not a simpler one, and how much slower the others are.
    simpler = rows[: rows.index(chosen)]
    too_large = [row for row in simpler if not row.fits]
    slower = [row for row in simpler if row.fits] + [row for row in fitting if rows.index(row) > rows.index(chosen)]
    reason = f"{_name(chosen)} fits, {gigabytes(needed_bytes(chosen))} of {gigabytes(chosen.usable_bytes)} usable"
    if too_large:
        reason += "; " + ", ".join(f"{_name(row)} would need {gigabytes(needed_bytes(row))}" for row in too_large)
    if slower:
        others = [f"{_name(row)} {row.step_seconds / chosen.step_seconds - 1:+.0%}" for row in slower]
        reason += f"; planned time of a step, compared with it: {', '.join(others)}"
    return chosen, reason


def suggestions(recipe: Recipe, job: Job) -> Iterator[str]:
    """Yield the single changes of the recipe, and the machines, that would fit, the cheapest first."""
    training = recipe.training
    lora, checkpointing = training.lora, training.gradient_checkpointing
    # 1. Gradient checkpointing.
    if not checkpointing and (name := _first_fit(job, lora=lora, checkpointing=True)):
        yield f"training.gradient_checkpointing=true with training.strategy={name}"
    # 2. Rows of half the tokens, a quarter and so on; a row cannot be shorter than the longest conversation.
    row_tokens = job.row_tokens // 2
    while row_tokens >= job.workload.longest:
        part = row_tokens // job.sequence_parallel
        row = (part, _supervised_of(job, part))
        if name := _first_fit(job, lora=lora, checkpointing=checkpointing, row=row):
            yield f"training.row_tokens={row_tokens} with training.strategy={name}"
            break
        row_tokens //= 2
    # 3. LoRA, without and with gradient checkpointing.
    if lora is None:
        for tried in (checkpointing, True):
            if name := _first_fit(job, lora=_LORA, checkpointing=tried):
                more = " training.gradient_checkpointing=true" if tried and not checkpointing else ""
                yield f"training.lora={{rank: {_LORA.rank}}}{more} with training.strategy={name}"
                break
    # 4. More GPUs, or on a CPU more memory.
    yield from _more_gpus(job, lora, checkpointing)
    if job.machine.kind == "cpu":
        least = min((predict_recipe(recipe, job, strategy) for strategy in STRATEGIES), key=needed_bytes)
        yield f"{gigabytes(needed_bytes(least))} for each process, with training.strategy={least.setting.strategy}"
        return
    # 5. Offload.
    for strategy in ZERO:
        if predict(job, strategy, lora=lora, checkpointing=True, offload=True).fits:
            yield f"training.strategy={strategy} training.gradient_checkpointing=true training.offload=optimizer"
            break


def _more_gpus(job: Job, lora: LoraRecipe | None, checkpointing: bool) -> Iterator[str]:
    """Yield the fewest GPUs that fit the recipe, and the fewest with gradient checkpointing where those are fewer."""
    if job.machine.kind == "cpu":
        return
    fewest = _MOST_PROCESSES + 1
    for tried in dict.fromkeys((checkpointing, True)):
        processes = job.processes
        while (processes := 1 << processes.bit_length()) < fewest:  # the next power of two
            nodes = -(-processes // job.machine.per_node)
            larger = replace(job, processes=processes, nodes=nodes)
            if name := _first_fit(larger, lora=lora, checkpointing=tried):
                fewest = processes
                more = " training.gradient_checkpointing=true" if tried and not checkpointing else ""
                where = f" on {nodes} nodes" if nodes > 1 else ""
                yield f"{processes} {job.machine.name}{where} with training.strategy={name}{more}"


def _first_fit(job: Job, **setting: Any) -> str | None:
    """Return the simplest strategy that fits under a setting."""
    return next((name for name in STRATEGIES if predict(job, name, **setting).fits), None)


def _supervised_of(job: Job, tokens: int) -> int:
    """Return the supervised tokens of a row of this number of tokens, at the share of the workload's rows."""
    share = job.workload.row_supervised.sum() / job.workload.row_tokens.sum()
    return round(tokens * share)


def largest_row(job: Job, prediction: Prediction) -> int:
    """Return the tokens of the longest row that fits, rounded down to a multiple of 64; 0 where none fits.

    Memory grows linearly with the tokens of a row, so the slope and one prediction of a very long row determine it.
    """
    setting = prediction.setting
    cost = job.cost(setting.strategy, setting.lora)
    supervised_share = _supervised_of(job, 1_000_000) / 1_000_000
    per_token = token_bytes(cost, setting)
    per_token += supervised_share * kept_logit_bytes(cost, setting)
    tokens = 1 << 24  # a row so long that its activations decide the peak
    very_long = predict(
        job,
        setting.strategy,
        checkpointing=setting.checkpointing,
        lora=setting.lora,
        row=(tokens, round(tokens * supervised_share)),
    )
    fixed_bytes = very_long.memory.peak - tokens * per_token
    left = prediction.usable_bytes - prediction.process_bytes - fixed_bytes
    return max(0, int(left / per_token) * job.sequence_parallel // 64 * 64)


def _name(prediction: Prediction) -> str:
    return prediction.setting.strategy + (" with offload" if prediction.setting.offload else "")


def needed_bytes(prediction: Prediction) -> float:
    """Return the bytes of the largest process, with what a CPU process holds before it loads the model."""
    return prediction.memory.peak + prediction.process_bytes


def gigabytes(size: float) -> str:
    """Return a number of bytes as text, in GB with one decimal."""
    return f"{size / 1e9:.1f} GB"


@dataclass(frozen=True)
class PlanOptions:
    """The options of `minisft plan`.

    Attributes:
        gpu: Name of the machine; None means this machine.
        count: Processes of a node; None means the recipe's.
        nodes: Number of nodes.
        dry_run: Whether to execute steps on GPUs that are not there.
    """

    gpu: str | None
    count: int | None
    nodes: int
    dry_run: bool = False


def plan_for(recipe: Recipe, options: PlanOptions) -> Plan:
    """Plan a recipe for a machine.

    Raises:
        UserError: The machine is unknown, the count impossible, the model's configuration cannot be used, or a dry run
            is asked for that this machine cannot do.
    """
    count = recipe.training.processes if options.count is None else options.count
    machine = limited(machine_named(options.gpu, max(count, 1), recipe.training.precision), recipe)
    require_count(machine, count, options.nodes)
    if options.dry_run:
        require_gpu(machine)
    config_of(recipe)  # so that a broken configuration is reported before the data is prepared
    sizes, notes = _read_or_prepare_sizes(recipe)
    if machine.kind == "cpu" and (load := load_of_machine()) > machine.per_node / 2:
        notes += (
            f"other programs are running (load {load:.1f} on {machine.per_node} cores): an idle machine is faster",
        )
    job = job_of(recipe, machine, sizes=sizes, count=count, nodes=options.nodes)
    plan = make_plan(recipe, job, notes)
    if not options.dry_run:
        return plan
    strategy: str = recipe.training.strategy
    if strategy == "auto":
        strategy = plan.chosen.setting.strategy if plan.chosen else "vanilla"
    return replace(plan, dry_run=dry_run(recipe, job, strategy))


def limited(machine: Machine, recipe: Recipe) -> Machine:
    """Return the machine with the memory that the recipe allows a process."""
    limit = recipe.training.memory_limit_gb
    return machine if limit is None else replace(machine, memory=limit * 1e9)


def _read_or_prepare_sizes(recipe: Recipe) -> tuple[Sizes | None, tuple[str, ...]]:
    """Return the data's lengths and notes, preparing the data where needed; None where it cannot be prepared."""
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
