"""`training.strategy=auto`: the cheapest strategy that fits by the plan, confirmed by a trial of two steps."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.console import say
from minisft.errors import StoppedError, UserError
from minisft.manifest import delete_scratch_folder, make_scratch_folder
from minisft.planning.machines import machine_named
from minisft.planning.planner import (
    choose,
    gigabytes,
    job_of,
    limited,
    needed_bytes,
    predict_recipe,
    prepared_sizes,
    suggestions,
)
from minisft.planning.prediction import Job, Prediction
from minisft.recipe import STRATEGIES, Recipe
from minisft.run_folder import RunFolder, read_metrics, trust_arguments, write_resolved_recipe
from minisft.run_start import open_run
from minisft.training.device import on_cpu
from minisft.training.distributed import launch, launch_single
from minisft.training.zero import ZERO_STAGES, require_deepspeed

if TYPE_CHECKING:
    from minisft.recipe import TrainingRecipe


TRIAL_STEPS = 2  # optimizer steps: the first one allocates the optimizer's states at its end
PROCESS_FILE = "process_bytes"  # file in the trial's folder: bytes of a process before it loads the model
OUT_OF_MEMORY = "out of memory"  # `where` of the trial's error, by which the parent process recognises it
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory")  # in the errors of torch and Linux
_MODULE = "minisft.planning.auto"
_KILLED = "SIGKILL"  # the signal by which the kernel ends a process when memory is exhausted
_WHERE = "training.strategy=auto"


@dataclass(frozen=True)
class Trial:
    """The memory and time of a strategy's trial.

    Attributes:
        strategy: The strategy that was tried.
        peak: Peak bytes of the largest process; None where it ran out of memory.
        process: Bytes of a process before it loads the model.
        seconds: Seconds of the last step.
    """

    strategy: str
    peak: float | None
    process: float = 0.0
    seconds: float = 0.0


def try_strategy(
    recipe: Recipe,
    run: RunFolder,
    job: Job,
    steps: int = TRIAL_STEPS,
    *,
    launch_single: Callable[[str, list[str]], bool] = launch_single,
    launch: Callable[[str, list[str], int], bool] = launch,
) -> Trial:
    """Take the run's heaviest step a few times, in the processes that the run will have, without a checkpoint.

    Args:
        recipe: Recipe with the strategy to try.
        run: Run folder that holds the prepared data.
        job: What is trained; its workload says which step is the heaviest.
        steps: Number of optimizer steps to take.
        launch_single: Runs a module with arguments in one process, as `distributed.launch_single` does.
        launch: Runs a module with arguments in a number of processes, as `distributed.launch` does.

    Raises:
        UserError: A process raised one that is not about memory.
        RuntimeError: A process failed for another reason than memory.
        StoppedError: The trial was asked to stop.
    """
    training = recipe.training
    root = run.root / ".trial"
    make_scratch_folder(root)
    try:
        # 1. Take the steps.
        trial_run = _make_trial(recipe, run, job, root, steps)
        single = training.processes == 1 and training.strategy not in ZERO_STAGES
        arguments = [str(root), *trust_arguments(recipe)]
        if launch_single(_MODULE, arguments) if single else launch(_MODULE, arguments, training.processes):
            raise StoppedError("stopped as asked, in a trial")
        # 2. Read what they needed.
        metrics = read_metrics(trial_run)
        peak = max(line["peak_memory_mb"] for line in metrics) * 1e6
        process = float((trial_run.root / PROCESS_FILE).read_text(encoding="utf-8"))
        return Trial(training.strategy, peak, process, metrics[-1]["seconds"])
    except (RuntimeError, UserError) as error:
        if not ((isinstance(error, UserError) and error.where == OUT_OF_MEMORY) or _KILLED in str(error)):
            raise
        return Trial(training.strategy, None)
    finally:
        delete_scratch_folder(root)


def _make_trial(recipe: Recipe, run: RunFolder, job: Job, root: Path, steps: int) -> RunFolder:
    """Make a run folder whose training data is the heaviest step's conversations, and whose steps take all of them."""
    import datasets

    heaviest = job.workload.heaviest_step
    training = replace(
        recipe.training, max_steps=steps, batch_size=-(-len(heaviest) // recipe.training.processes),
        gradient_accumulation=1, packing=False, log_every=1, save_every=steps, report_to=[],
    )  # fmt: skip
    with open_run(replace(recipe, output=str(root), training=training)) as trial:
        chosen = datasets.load_from_disk(str(run.dataset / "train")).select(heaviest)
        datasets.disable_progress_bars()
        chosen.save_to_disk(str(trial.dataset / "train"))
        datasets.enable_progress_bars()
    return trial


def settle_strategy(
    recipe: Recipe,
    run: RunFolder,
    *,
    job: Job | None = None,
    strategies: Sequence[str] | None = None,
    try_strategy: Callable[[Recipe, RunFolder, Job], Trial] = try_strategy,
) -> Recipe:
    """Choose the strategy of a recipe whose data is prepared, try it, and write it into the run's recipe.

    Args:
        recipe: Recipe whose strategy is `auto`.
        run: Its run folder.
        job: What is trained on which machine; None means the recipe on this machine.
        strategies: Strategies to choose from; None means all that can start on this machine.
        try_strategy: Tries the recipe, with a strategy in it, on the job.

    Raises:
        UserError: Nothing fits; the fix names changes that would fit.
    """
    # 1. Predict every strategy.
    job = job or _job_on_this_machine(recipe)
    machine = job.machine
    if strategies is None:
        strategies = _available_strategies()
    predictions = [predict_recipe(recipe, job, strategy) for strategy in strategies]
    # 2. Try those that fit, the cheapest first, until the trial of one fits.
    failed: list[str] = []
    untried = list(predictions)
    while untried:
        prediction, reason = choose(untried)
        if prediction is None:
            break
        untried.remove(prediction)
        strategy = prediction.setting.strategy
        say(f"strategy auto: {reason}; trying {TRIAL_STEPS} steps")
        settled = replace(recipe, training=replace(recipe.training, strategy=strategy))  # type: ignore[arg-type]
        trial = try_strategy(settled, run, job)
        if trial.peak is not None and trial.peak <= machine.memory:
            say(f"strategy auto: {strategy}, {gigabytes(trial.peak)} and {trial.seconds:.1f} s a step in its trial")
            write_resolved_recipe(run, settled)
            return settled
        failed.append(f"{strategy} took {gigabytes(trial.peak)}" if trial.peak else f"{strategy} ran out of memory")
        say(f"strategy auto: {failed[-1]} of {gigabytes(machine.memory)} in its trial")
    raise _nothing_fits(recipe, job, predictions, failed)


def predicted_strategy(recipe: Recipe) -> Recipe:
    """Return the recipe with the strategy that the plan chooses, without a trial.

    Raises:
        UserError: Nothing fits; the fix names changes that would fit.
    """
    job = _job_on_this_machine(recipe)
    predictions = [predict_recipe(recipe, job, strategy) for strategy in _available_strategies()]
    chosen, _ = choose(predictions)
    if chosen is None:
        raise _nothing_fits(recipe, job, predictions, [])
    return replace(recipe, training=replace(recipe.training, strategy=chosen.setting.strategy))  # type: ignore[arg-type]


def _job_on_this_machine(recipe: Recipe) -> Job:
    machine = limited(machine_named(None, recipe.training.processes, recipe.training.precision), recipe)
    return job_of(recipe, machine, sizes=prepared_sizes(recipe))


def _available_strategies() -> list[str]:
    """Return the strategies that can start on this machine: ZeRO needs DeepSpeed."""
    available: list[str] = []
    for strategy in STRATEGIES:
        try:
            if strategy in ZERO_STAGES:
                require_deepspeed(strategy, on_cpu())
            available.append(strategy)
        except UserError as error:
            say(f"strategy auto: {strategy} is not considered: {error.problem}")
    return available


def _nothing_fits(recipe: Recipe, job: Job, predictions: list[Prediction], failed: list[str]) -> UserError:
    needs = [f"{row.setting.strategy} {gigabytes(needed_bytes(row))}" for row in predictions if not row.fits]
    problem = f"nothing fits in {gigabytes(job.machine.memory)} a process: " + ", ".join(
        failed + ([f"by the plan {', '.join(needs)}"] if needs else [])
    )
    changes = list(suggestions(recipe, job))
    return UserError(_WHERE, problem, "; or ".join(changes) if changes else "use a smaller model or a larger machine")


# --- the process of a trial -------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is about memory: torch raises its own class on a GPU, a plain RuntimeError on a CPU."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _NO_MEMORY)


def main() -> None:
    """Take the steps of the trial whose folder is the first argument; the second may be the consent to run its code."""
    from minisft.run_folder import TRUST_OPTION
    from minisft.training.distributed import run_worker

    run_worker(lambda: take_trial(Path(sys.argv[1]), TRUST_OPTION in sys.argv[2:]))


def take_trial(root: Path, trust_remote_code: bool = False) -> None:
    """Take the steps of a trial's run folder, without a checkpoint.

    Raises:
        UserError: This process ran out of memory; its `where` is `OUT_OF_MEMORY`.
    """
    import torch
    from transformers import TrainerCallback

    from minisft.console import error_console
    from minisft.run_folder import RunFolder, load_run
    from minisft.training.device import on_cpu
    from minisft.training.run_training import make_trainer, take_steps
    from minisft.training.zero import set_deepspeed_environment

    class NoCheckpoint(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
            control.should_save = False  # type: ignore[attr-defined]

        on_epoch_end = on_step_end

    set_deepspeed_environment(on_cpu())
    error_console.quiet = True
    run = RunFolder(root)
    recipe = load_run(root, trust_remote_code=trust_remote_code)
    _write_process_bytes(root, recipe.training)
    try:
        trainer = make_trainer(recipe, run)
        trainer.add_callback(NoCheckpoint())
        take_steps(trainer, run)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(OUT_OF_MEMORY, str(error), "try another strategy") from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _write_process_bytes(root: Path, training: "TrainingRecipe") -> None:
    """Import every library of the training, and write the memory that the process has before it loads the model."""
    import datasets  # noqa: F401
    import psutil
    import torch.utils.tensorboard  # noqa: F401

    import minisft.training.trainer  # noqa: F401
    from minisft.training.device import on_cpu
    from minisft.training.zero import ZERO_STAGES, start_communication

    if training.strategy in ZERO_STAGES:
        start_communication(on_cpu())  # this imports DeepSpeed
    if training.lora is not None:
        import peft  # noqa: F401
    if os.environ.get("RANK", "0") == "0":
        (root / PROCESS_FILE).write_text(str(psutil.Process().memory_info().rss), encoding="utf-8")


if __name__ == "__main__":
    main()
