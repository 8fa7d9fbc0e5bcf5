"""The strategy and its checkpoints: the same steps as vanilla, exact resuming, and the cost that `plan` predicted."""

from pathlib import Path
from typing import Any

import torch

from minisft.checking.context import CheckContext
from minisft.checking.loss_checks import live_trainer, tolerance
from minisft.checking.reference import count_learned, padded_loss, plain_attention, plain_steps
from minisft.checking.result import Failed
from minisft.checking.scratch import RESUME_AT, STEPS, resumed_run
from minisft.data.encoder import Encoder
from minisft.models import load_model, load_tokenizer
from minisft.run_folder import RunFolder, read_metrics
from minisft.training.batching import StepSampler, measure_lengths
from minisft.training.optimization import clipping_norm
from minisft.training.zero import ZERO_STAGES

_REPORT = "report it, with the versions in check.json"
Taken = list[tuple[float, float]]  # (loss, gradient norm) of each step


def strategy_takes_the_same_steps(context: CheckContext) -> str:
    """Take steps in processes of their own as `train` does, and the same in this one, and compare."""
    recipe = context.chosen_recipe
    training = recipe.training
    context.free_model()  # the processes need the memory
    context.take_steps(recipe)
    logged = read_metrics(context.chosen_run)
    plain = training.strategy not in ZERO_STAGES and training.processes == 1
    if plain and training.optimizer == "adamw":
        other, expected = "a plain padded loop", _plain_loop(context, [line["learning_rate"] for line in logged])
    else:
        other, expected = "vanilla on one process", _vanilla(context, in_pieces=plain)
    for line, (loss, norm) in zip(logged, expected, strict=True):
        for name, here in (("loss", loss), ("grad_norm", norm)):
            _compare_step(context, line, name, here, other)
    losses = ", ".join("{loss:.4f}".format(**line) for line in logged)
    return (
        f"{STEPS} steps of {context.steps.conversations} conversations under {training.strategy} on "
        f"{training.processes} process(es) and in {other}: losses {losses}"
    )


def _compare_step(context: CheckContext, line: dict[str, Any], name: str, here: float, other: str) -> None:
    allowed = tolerance(context) * (2 if name == "loss" else 20)
    if abs(line[name] - here) > allowed * abs(here):
        training = context.chosen_recipe.training
        raise Failed(
            f"step {line['step']}: {name} {line[name]:.5f} under {training.strategy} on {training.processes} "
            f"process(es), {here:.5f} in {other}",
            f"use another training.strategy, and {_REPORT}",
        )


def _vanilla(context: CheckContext, *, in_pieces: bool) -> Taken:
    """The steps in this process, through the Trainer; `in_pieces` gives every conversation a forward of its own."""
    trainer = live_trainer(context)
    if in_pieces:
        trainer.sampler.row_tokens = 1
    trainer.train()
    run = RunFolder(Path(context.reference_recipe.output))
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(run)]


def _plain_loop(context: CheckContext, learning_rates: list[float]) -> Taken:
    """The steps in this process, without the Trainer."""
    trainer = live_trainer(context)
    model: Any = trainer.model
    with plain_attention(model):
        return plain_steps(
            model,
            [_conversations_of(trainer.train_dataset, step) for step in _order(context, trainer.train_dataset)],
            learning_rates,
            decayed=set(trainer.get_decay_parameter_names(model)),
            weight_decay=context.recipe.training.weight_decay,
            max_grad_norm=clipping_norm(context.recipe.training),
            arithmetic=trainer.compute_loss_context_manager,
        )


def _order(context: CheckContext, dataset: Any) -> list[tuple[int, ...]]:
    """The conversations of each of the steps."""
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
    """Load a checkpoint in plain transformers: it has the loss that the next step had, the template and the ends."""
    context.free_model()
    run = context.chosen_run
    folder = run.checkpoints / f"checkpoint-{RESUME_AT}"
    logged = next(line for line in read_metrics(run) if line["step"] == RESUME_AT + 1)
    loss = _plain_loss(context, folder)
    if abs(loss - logged["loss"]) > 2 * tolerance(context) * abs(loss):
        problem = (
            f"plain transformers gives {loss:.5f} with {folder.name}, the training went on with {logged['loss']:.5f}"
        )
        raise Failed(problem, f"use another training.strategy, and {_REPORT}")
    _compare_tokenizer(context, folder)
    return f"{folder.name} in plain transformers: loss {loss:.4f}, as logged at step {RESUME_AT + 1}"


def _plain_loss(context: CheckContext, folder: Path) -> float:
    """The mean loss, in plain transformers, of the step that follows the checkpoint."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(context.chosen_run.dataset / "train"))
    conversations = _conversations_of(dataset, _order(context, dataset)[RESUME_AT])
    model = load_model(folder, dtype=torch.float32, trust_remote_code=context.recipe.trust_remote_code)
    with torch.no_grad():
        return float(padded_loss(model.eval(), conversations)) / count_learned(conversations)


def _compare_tokenizer(context: CheckContext, folder: Path) -> None:
    from transformers import GenerationConfig

    encoder = context.encoder
    saved = load_tokenizer(folder, context.recipe.trust_remote_code)
    if saved.chat_template != encoder.chat_template:
        raise Failed("the checkpoint's chat template is not the one trained with", _REPORT)
    if Encoder(saved, "auto").stop_token_ids != encoder.stop_token_ids:
        raise Failed("the checkpoint's template ends answers with another token than was trained", _REPORT)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if set(ends if isinstance(ends, list) else [ends]) != set(encoder.stop_token_ids):
        raise Failed("the checkpoint's generation config stops at another token than was trained", _REPORT)


def resuming_goes_on_alike(context: CheckContext) -> str:
    """Compare the step after a checkpoint, resumed, with the same step undisturbed: log and weights."""
    run = context.chosen_run
    again = resumed_run(run)
    logged = {line["step"]: line for line in read_metrics(run)}
    resumed = read_metrics(again)
    if [line["step"] for line in resumed] != list(range(RESUME_AT + 1, STEPS + 1)):
        raise Failed(f"resumed after step {RESUME_AT}, it logged {[line['step'] for line in resumed]}", _REPORT)
    for line in resumed:
        for name in ("loss", "grad_norm", "learning_rate", "supervised_tokens"):
            _compare_resumed(line["step"], name, logged[line["step"]][name], line[name], context)
    difference = _weights_difference(run, again)
    if difference > (0.0 if tolerance(context) < 1e-3 else 1e-3):
        raise Failed(f"after step {STEPS} a weight differs by {difference:.2e} from the undisturbed run's", _REPORT)
    return f"step {STEPS} after checkpoint-{RESUME_AT}: the same loss, and weights that differ by {difference:.0e}"


def _compare_resumed(step: int, name: str, undisturbed: float, resumed: float, context: CheckContext) -> None:
    if abs(undisturbed - resumed) > tolerance(context) * abs(undisturbed):
        problem = f"step {step} has {name} {resumed:.6f} when resumed, {undisturbed:.6f} undisturbed"
        raise Failed(problem, f"do not rely on --resume here, and {_REPORT}")


def _weights_difference(run: RunFolder, again: RunFolder) -> float:
    """The largest difference between the weights of the last checkpoints."""
    from safetensors.torch import load_file

    largest = 0.0
    for file in sorted((run.checkpoints / f"checkpoint-{STEPS}").glob("*.safetensors")):
        first, second = load_file(file), load_file(again.checkpoints / f"checkpoint-{STEPS}" / file.name)
        for name, weight in first.items():
            largest = max(largest, float((weight.float() - second[name].float()).abs().max()))
    return largest


MAX_RATIO = 2.0  # a prediction that is off by more than this factor is none
MAX_SLOWDOWN, SLOW = 5.0, 1.0  # times as planned; seconds: of a shorter step most is not arithmetic
_PLAN = "do not rely on `minisft plan` for this model, and report it"
_BUSY = f"see whether other programs keep the machine busy; if none does, {_PLAN}"


def memory_is_as_planned(context: CheckContext, max_ratio: float = MAX_RATIO) -> str:
    """Compare the peak memory of the scratch steps with the prediction for them, and the run's with the machine.

    Measured and predicted memory may differ by the factor `max_ratio`.
    """
    small, whole = context.predictions
    measured = max(line["peak_memory_mb"] for line in read_metrics(context.chosen_run)) * 1e6
    predicted = small.process_bytes + small.peak_memory_bytes
    needed = whole.process_bytes + whole.peak_memory_bytes
    if not 1 / max_ratio <= measured / predicted <= max_ratio:
        raise Failed(f"the steps took {_gb(measured)}, the plan says {_gb(predicted)}", _PLAN)
    if not whole.fits:
        fix = "see `minisft plan` for what fits; training.row_tokens, gradient_checkpointing, lora and ZeRO need less"
        raise Failed(f"the run needs {_gb(needed)} a process, and there are {_gb(whole.usable_bytes)}", fix)
    there = f"{_gb(needed)} planned of {_gb(whole.usable_bytes)} a process"
    return f"steps: {_gb(measured)}, planned {_gb(predicted)}; the run: {there}"


def time_is_as_planned(context: CheckContext, max_slowdown: float = MAX_SLOWDOWN, min_seconds: float = SLOW) -> str:
    """Compare the time of a scratch step with the prediction for it, and scale that of the whole run by it.

    It fails where a step takes more than `min_seconds`, and more than `max_slowdown` times the prediction.
    """
    small, whole = context.predictions
    later = [line["seconds"] for line in read_metrics(context.chosen_run)[1:]]
    measured = sum(later) / len(later)
    factor = measured / small.step_seconds
    assert whole.total_seconds is not None, "its data is prepared"
    left = whole.total_seconds * factor
    if measured > max_slowdown * small.step_seconds and measured > min_seconds:
        raise Failed(f"a step takes {measured:.1f} s, the plan says {small.step_seconds:.1f} s", _BUSY)
    return (
        f"a step of the check: {measured:.2f} s, planned {small.step_seconds:.2f} s; the run: {whole.steps:,} steps of "
        f"about {whole.step_seconds * factor:.1f} s, {_duration(left)}, planned {_duration(whole.total_seconds)}"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
