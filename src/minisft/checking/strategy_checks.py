"""Checks of the strategy: the same steps as vanilla, checkpoints that load and resume, and the planned cost."""

from pathlib import Path
from typing import Any

import torch

from minisft.checking.context import CheckContext
from minisft.checking.loss_checks import live_trainer, tolerance
from minisft.checking.reference import count_learned, padded_loss, plain_steps
from minisft.checking.result import Failed
from minisft.checking.scratch import RESUME_AT, STEPS, resumed_run
from minisft.data.encoder import Encoder
from minisft.models import load_model, load_tokenizer, transformers_attention
from minisft.planning.plan_table import duration
from minisft.run_folder import RunFolder, read_metrics
from minisft.training.batching import StepSampler, measure_lengths
from minisft.training.optimization import clipping_norm
from minisft.training.zero import ZERO_STAGES

_REPORT = "report it, with the versions in check.json"
TakenSteps = list[tuple[float, float]]  # (loss, gradient norm) of each step
MAX_RATIO = 2.0  # largest factor between predicted and measured memory, in both directions
MAX_SLOWDOWN = 5.0  # largest ratio of measured and predicted time of a step
MIN_STEP_SECONDS = 1.0  # shorter steps are not compared, since most of their time is not arithmetic
_PLAN = "do not rely on `minisft plan` for this model, and report it"
_BUSY = f"see whether other programs keep the machine busy; if not, {_PLAN}"


def strategy_takes_the_same_steps(context: CheckContext) -> str:
    """Take steps in separate processes as `train` does, take the same steps in this process, and compare."""
    # 1. The steps as `train` takes them.
    recipe = context.chosen_recipe
    training = recipe.training
    context.free_model()  # the processes need the memory
    context.take_steps(recipe)
    logged = read_metrics(context.chosen_run)
    # 2. The same steps in this process: without the Trainer where the recipe trains without a strategy itself.
    without_strategy = training.strategy not in ZERO_STAGES and training.processes == 1
    if without_strategy and training.optimizer == "adamw":
        reference, expected = "a plain padded loop", _plain_loop(context, [line["learning_rate"] for line in logged])
    else:
        reference = "vanilla on one process"
        expected = _vanilla_steps(context, split=without_strategy)
    # 3. Loss and gradient norm of each step.
    for line, values in zip(logged, expected, strict=True):
        for name, value, factor in zip(("loss", "grad_norm"), values, (2, 20), strict=True):
            if abs(line[name] - value) > tolerance(context) * factor * abs(value):
                raise Failed(
                    f"step {line['step']}: {name} {line[name]:.5f} under {training.strategy} on {training.processes} "
                    f"process(es), {value:.5f} in {reference}",
                    f"use another training.strategy, and {_REPORT}",
                )
    losses = ", ".join("{loss:.4f}".format(**line) for line in logged)
    return (
        f"{STEPS} steps of {context.steps.conversations} conversations under {training.strategy} on "
        f"{training.processes} process(es) and in {reference}: losses {losses}"
    )


def _vanilla_steps(context: CheckContext, *, split: bool) -> TakenSteps:
    """Take the steps in this process, through the Trainer; `split` gives every conversation a forward of its own."""
    trainer = live_trainer(context)
    if split:
        trainer.sampler.row_tokens = 1
    trainer.train()
    run = RunFolder(Path(context.reference_recipe.output))
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(run)]


def _plain_loop(context: CheckContext, learning_rates: list[float]) -> TakenSteps:
    """Take the steps in this process, without the Trainer."""
    trainer = live_trainer(context)
    model: Any = trainer.model
    with transformers_attention(model), trainer.arithmetic_of_fp32():
        return plain_steps(
            model,
            [_conversations_of(trainer.train_dataset, step) for step in _batches(context, trainer.train_dataset)],
            learning_rates,
            decayed=set(trainer.get_decay_parameter_names(model)),
            weight_decay=context.recipe.training.weight_decay,
            max_grad_norm=clipping_norm(context.recipe.training),
        )


def _batches(context: CheckContext, dataset: Any) -> list[tuple[int, ...]]:
    """Return the indexes of the conversations of each step, in the order of training."""
    sampler = StepSampler(
        measure_lengths(dataset),
        global_batch=context.steps.conversations,
        row_tokens=1 << 40,
        processes=1,
        rank=0,
        seed=context.recipe.seed,
        pack_tokens=context.recipe.data.max_length if context.recipe.training.packing else None,
    )
    steps: list[tuple[int, ...]] = []
    while len(steps) < STEPS:
        steps += [plans[0].indexes for plans in sampler]
        sampler.epoch += 1
    return steps[:STEPS]


def _conversations_of(dataset: Any, indexes: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    rows = [dataset[index] for index in indexes]
    return [(row["input_ids"], row["labels"]) for row in rows]


def checkpoint_loads_anywhere(context: CheckContext) -> str:
    """Load a checkpoint in plain transformers, and compare the next step's loss, the template and the stop tokens."""
    from datasets import load_from_disk

    # 1. The mean loss of the step that follows the checkpoint, in plain transformers.
    context.free_model()
    run = context.chosen_run
    folder = run.checkpoints / f"checkpoint-{RESUME_AT}"
    dataset = load_from_disk(str(run.dataset / "train"))
    conversations = _conversations_of(dataset, _batches(context, dataset)[RESUME_AT])
    model = load_model(folder, dtype=torch.float32, trust_remote_code=context.recipe.trust_remote_code)
    with torch.no_grad():
        loss = float(padded_loss(model.eval(), conversations)) / count_learned(conversations)
    del model
    # 2. The training logged the same loss.
    logged = next(line for line in read_metrics(run) if line["step"] == RESUME_AT + 1)
    if abs(loss - logged["loss"]) > 2 * tolerance(context) * abs(loss):
        problem = (
            f"plain transformers gives the loss {loss:.5f} with {folder.name}, the training logged {logged['loss']:.5f}"
        )
        raise Failed(problem, f"use another training.strategy, and {_REPORT}")
    # 3. The saved tokenizer and generation config.
    _compare_tokenizer(context, folder)
    return f"{folder.name} in plain transformers: loss {loss:.4f}, as logged at step {RESUME_AT + 1}"


def _compare_tokenizer(context: CheckContext, folder: Path) -> None:
    """Compare a checkpoint's template and stop tokens with those of the training."""
    from transformers import GenerationConfig

    encoder = context.encoder
    saved = load_tokenizer(folder, context.recipe.trust_remote_code)
    if saved.chat_template != encoder.chat_template:
        raise Failed("the checkpoint's chat template is not that of the training", _REPORT)
    if Encoder(saved, "auto").stop_token_ids != encoder.stop_token_ids:
        raise Failed("the checkpoint's template ends answers with another token than the training", _REPORT)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if set(ends if isinstance(ends, list) else [ends]) != set(encoder.stop_token_ids):
        raise Failed("the checkpoint's generation config stops at another token than the training", _REPORT)


def resumed_steps_are_the_same(context: CheckContext) -> str:
    """Compare the step after a checkpoint, resumed, with the same step of the uninterrupted run: log and weights."""
    # 1. The log has the remaining steps.
    run = context.chosen_run
    resumed = resumed_run(run)
    logged = {line["step"]: line for line in read_metrics(run)}
    lines = read_metrics(resumed)
    steps = [line["step"] for line in lines]
    if steps != list(range(RESUME_AT + 1, STEPS + 1)):
        raise Failed(f"resumed after step {RESUME_AT}, it logged the steps {steps}", _REPORT)
    # 2. Their values are the same.
    for line in lines:
        for name in ("loss", "grad_norm", "learning_rate", "supervised_tokens"):
            expected = logged[line["step"]][name]
            if abs(expected - line[name]) > tolerance(context) * abs(expected):
                problem = f"step {line['step']} has {name} {line[name]:.6f} when resumed, {expected:.6f} uninterrupted"
                raise Failed(problem, f"do not rely on --resume on this machine, and {_REPORT}")
    # 3. The weights are the same: bit for bit in fp32.
    difference = _weights_difference(run, resumed)
    if difference > (0.0 if tolerance(context) < 1e-3 else 1e-3):
        raise Failed(f"after step {STEPS} a weight differs by {difference:.2e} from the uninterrupted run's", _REPORT)
    return f"step {STEPS} after checkpoint-{RESUME_AT}: the same loss, and weights that differ by {difference:.0e}"


def _weights_difference(run: RunFolder, resumed: RunFolder) -> float:
    """Return the largest difference between the weights of the last checkpoints."""
    from safetensors.torch import load_file

    largest = 0.0
    for file in sorted((run.checkpoints / f"checkpoint-{STEPS}").glob("*.safetensors")):
        weights, resumed_weights = load_file(file), load_file(resumed.checkpoints / f"checkpoint-{STEPS}" / file.name)
        for name, weight in weights.items():
            largest = max(largest, float((weight.float() - resumed_weights[name].float()).abs().max()))
    return largest


def memory_is_as_planned(context: CheckContext, max_ratio: float = MAX_RATIO) -> str:
    """Compare the peak memory of the scratch steps with their prediction, and the run's prediction with the machine.

    Measured and predicted memory may differ by the factor `max_ratio`.
    """
    scratch, full_run = context.predictions
    measured = max(line["peak_memory_mb"] for line in read_metrics(context.chosen_run)) * 1e6
    predicted = scratch.process_bytes + scratch.peak_memory_bytes
    needed = full_run.process_bytes + full_run.peak_memory_bytes
    if not 1 / max_ratio <= measured / predicted <= max_ratio:
        raise Failed(f"the steps took {_gb(measured)}, the plan says {_gb(predicted)}", _PLAN)
    if not full_run.fits:
        fix = "see `minisft plan` for what fits; training.row_tokens, gradient_checkpointing, lora and ZeRO need less"
        problem = f"the run needs {_gb(needed)} a process, and {_gb(full_run.usable_bytes)} are available"
        raise Failed(problem, fix)
    run = f"{_gb(needed)} planned of {_gb(full_run.usable_bytes)} a process"
    return f"steps: {_gb(measured)}, planned {_gb(predicted)}; the run: {run}"


def time_is_as_planned(
    context: CheckContext, max_slowdown: float = MAX_SLOWDOWN, min_seconds: float = MIN_STEP_SECONDS
) -> str:
    """Compare the time of a scratch step with its prediction, and scale the prediction for the run accordingly.

    It fails where a step takes more than `min_seconds`, and more than `max_slowdown` times the prediction.
    """
    scratch, full_run = context.predictions
    later = [line["seconds"] for line in read_metrics(context.chosen_run)[1:]]  # the first step also allocates
    measured = sum(later) / len(later)
    slowdown = measured / scratch.step_seconds
    assert full_run.total_seconds is not None, "its data is prepared"
    if measured > max_slowdown * scratch.step_seconds and measured > min_seconds:
        raise Failed(f"a step takes {measured:.1f} s, the plan says {scratch.step_seconds:.1f} s", _BUSY)
    expected = f"{full_run.steps:,} steps of about {full_run.step_seconds * slowdown:.1f} s"
    return (
        f"a step of the check: {measured:.2f} s, planned {scratch.step_seconds:.2f} s; the run: {expected}, "
        f"{duration(full_run.total_seconds * slowdown)}, planned {duration(full_run.total_seconds)}"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
