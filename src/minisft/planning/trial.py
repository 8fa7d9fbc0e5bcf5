"""A process of a trial: `python -m minisft.planning.trial RUN_FOLDER [--trust-remote-code]`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.errors import UserError

if TYPE_CHECKING:
    from minisft.recipe import TrainingRecipe

PROCESS_FILE = "process_bytes"  # in the trial's folder

OUT_OF_MEMORY = "out of memory"  # where an error of the trial was, for the process that started it
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is about memory: torch raises its own on a GPU, a plain RuntimeError on a CPU."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _NO_MEMORY)


def main() -> None:
    from minisft.runs import TRUST_OPTION
    from minisft.training.launch import run_worker

    run_worker(lambda: take_trial(Path(sys.argv[1]), TRUST_OPTION in sys.argv[2:]))


def take_trial(root: Path, trust_remote_code: bool = False) -> None:
    """Take the steps of a trial's run folder, without a checkpoint.

    Raises:
        UserError: `OUT_OF_MEMORY`, this process ran out of it.
    """
    import torch
    from transformers import TrainerCallback

    from minisft.console import error_console
    from minisft.runs import RunFolder, load_run
    from minisft.training.hardware import on_cpu
    from minisft.training.strategies import set_deepspeed_environment
    from minisft.training.train import make_trainer, take_steps

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
    from minisft.training.hardware import on_cpu
    from minisft.training.strategies import ZERO_STAGES, start_communication

    if training.strategy in ZERO_STAGES:
        start_communication(on_cpu())  # which imports DeepSpeed
    if training.lora is not None:
        import peft  # noqa: F401
    if os.environ.get("RANK", "0") == "0":
        (root / PROCESS_FILE).write_text(str(psutil.Process().memory_info().rss), encoding="utf-8")


if __name__ == "__main__":
    main()
