"""`training.strategy=auto`: the cheapest strategy that fits by the plan, confirmed by a trial step."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
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


TRIAL_STEPS = 2  # the optimizer's states are made at the end of the first
_MODULE = "minisft.planning.auto"
_KILLED = "SIGKILL"  # how the kernel takes memory back
_WHERE = "training.strategy=auto"


@dataclass(frozen=True)
class Trial:
    """What a strategy's trial took.

    Attributes:
        strategy: that was tried.
        peak: bytes of the largest process at most; None where it ran out of memory.
        process: bytes of a process before the model.
        seconds: of the last step.
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
    """Take the run's heaviest step a few times, in processes as the run will have them, without a checkpoint.

    Args:
        recipe: with the strategy to try.
        run: Run folder that holds the prepared data.
        job: What is trained; its workload says which step is the heaviest.
        steps: Number of optimizer steps to take.
        launch_single: Runs a module with arguments in one process, as `distributed.launch_single` does.
        launch: Runs a module with arguments in a number of processes, as `distributed.launch` does.

    Raises:
        UserError: a process stopped with one that is not about memory.
        RuntimeError: a process failed otherwise.
    """
    training = recipe.training
    root = run.root / ".trial"
    make_scratch_folder(root)
    try:
        folder = _make_trial(recipe, run, job, root, steps)
        alone = training.processes == 1 and training.strategy not in ZERO_STAGES
        words = [str(root), *trust_arguments(recipe)]
        if launch_single(_MODULE, words) if alone else launch(_MODULE, words, training.processes):
            raise StoppedError("stopped as asked, in a trial")
        return _read(folder, training.strategy)
    except (RuntimeError, UserError) as error:
        if not ((isinstance(error, UserError) and error.where == OUT_OF_MEMORY) or _KILLED in str(error)):
            raise
        return Trial(training.strategy, None)
    finally:
        delete_scratch_folder(root)


def _make_trial(recipe: Recipe, run: RunFolder, job: Job, root: Path, steps: int) -> RunFolder:
    """Make a run folder whose training data is the heaviest step's conversations, all of them in every step."""
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


def _read(folder: RunFolder, strategy: str) -> Trial:
    lines = read_metrics(folder)
    process = float((folder.root / PROCESS_FILE).read_text(encoding="utf-8"))
    return Trial(strategy, max(line["peak_memory_mb"] for line in lines) * 1e6, process, lines[-1]["seconds"])


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
        recipe: whose strategy is `auto`.
        run: Its run folder.
        job: What is trained on which machine; None is the recipe on this one.
        strategies: Strategies to choose from; None means all that can start on this machine.
        try_strategy: Tries the recipe, with a strategy in it, on the job.

    Raises:
        UserError: nothing fits; naming what would.
    """
    job = job or _job_here(recipe)
    machine = job.machine
    if strategies is None:
        strategies = _strategies_here()
    predictions = [predict_recipe(recipe, job, strategy) for strategy in strategies]
    failed: list[str] = []
    for prediction, reason in _by_cost(predictions):
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
        UserError: nothing fits; naming what would.
    """
    job = _job_here(recipe)
    predictions = [predict_recipe(recipe, job, strategy) for strategy in _strategies_here()]
    chosen, _ = choose(predictions)
    if chosen is None:
        raise _nothing_fits(recipe, job, predictions, [])
    return replace(recipe, training=replace(recipe.training, strategy=chosen.setting.strategy))  # type: ignore[arg-type]


def _job_here(recipe: Recipe) -> Job:
    machine = limited(machine_named(None, recipe.training.processes, recipe.training.precision), recipe)
    return job_of(recipe, machine, sizes=prepared_sizes(recipe))


def _strategies_here() -> list[str]:
    return [strategy for strategy in STRATEGIES if _is_here(strategy)]


def _is_here(strategy: str) -> bool:
    """Say whether a strategy can start on this machine."""
    if strategy not in ZERO_STAGES:
        return True
    try:
        require_deepspeed(strategy, on_cpu())
    except UserError as error:
        say(f"strategy auto: {strategy} is left out: {error.problem}")
        return False
    return True


def _by_cost(predictions: list[Prediction]) -> Iterator[tuple[Prediction, str]]:
    left = list(predictions)
    while True:
        chosen, reason = choose(left)
        if chosen is None:
            return
        yield chosen, reason
        left.remove(chosen)
        if not left:
            return


def _nothing_fits(recipe: Recipe, job: Job, predictions: list[Prediction], failed: list[str]) -> UserError:
    needs = [f"{row.setting.strategy} {gigabytes(needed_bytes(row))}" for row in predictions if not row.fits]
    problem = f"nothing fits in {gigabytes(job.machine.memory)} a process: " + ", ".join(
        failed + ([f"by the plan {', '.join(needs)}"] if needs else [])
    )
    ways = list(suggestions(recipe, job))
    return UserError(_WHERE, problem, "; or ".join(ways) if ways else "take a smaller model or a larger machine")


# --- the process of a trial -------------------------------------------------------------------------------


PROCESS_FILE = "process_bytes"  # in the trial's folder

OUT_OF_MEMORY = "out of memory"  # where an error of the trial was, for the process that started it
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is about memory: torch raises its own on a GPU, a plain RuntimeError on a CPU."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _NO_MEMORY)


def main() -> None:
    from minisft.run_folder import TRUST_OPTION
    from minisft.training.distributed import run_worker

    run_worker(lambda: take_trial(Path(sys.argv[1]), TRUST_OPTION in sys.argv[2:]))


def take_trial(root: Path, trust_remote_code: bool = False) -> None:
    """Take the steps of a trial's run folder, without a checkpoint.

    Raises:
        UserError: `OUT_OF_MEMORY`, this process ran out of it.
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
    _note_process(root, recipe.training)
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


def _note_process(root: Path, training: "TrainingRecipe") -> None:
    """Write down what the process holds before the model: Python and the libraries."""
    import datasets  # noqa: F401
    import psutil
    import torch.utils.tensorboard  # noqa: F401

    import minisft.training.trainer  # noqa: F401
    from minisft.training.device import on_cpu
    from minisft.training.zero import ZERO_STAGES, start_communication

    if training.strategy in ZERO_STAGES:
        start_communication(on_cpu())  # which imports DeepSpeed
    if training.lora is not None:
        import peft  # noqa: F401
    if os.environ.get("RANK", "0") == "0":
        (root / PROCESS_FILE).write_text(str(psutil.Process().memory_info().rss), encoding="utf-8")


if __name__ == "__main__":
    main()
