"""Train a prepared run folder with MiniSFT, and measure it: python with_minisft.py OPTIONS, a JSON object."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Timer
from profiling import StepProfile

from minisft.recipe import DataRecipe, LoraRecipe, Recipe, TrainingRecipe
from minisft.run_folder import RunFolder
from minisft.training import batching
from minisft.training import trainer as trainer_module
from minisft.training.run_training import make_trainer, take_steps


class InsideTimer(Timer):
    """Also sum up the time in forward, loss, backward, clipping, optimizer and the clearing of gradients."""

    def __init__(self, result: Path, trainer: Any, **facts: Any) -> None:
        super().__init__(result, **facts)
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wrap them here: the optimizer is not made before."""
        self.facts["inside_seconds"] = 0.0
        trainer = self.trainer
        trainer_module.row_loss = self.timed(trainer_module.row_loss)
        trainer.accelerator.backward = self.timed(trainer.accelerator.backward)
        trainer._clip_grad_norm = self.timed(trainer._clip_grad_norm)
        trainer.optimizer.step = self.timed(trainer.optimizer.step)
        trainer.model.zero_grad = self.timed(trainer.model.zero_grad)
        super().on_train_begin(*args, **kwargs)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.facts["inside_seconds"] += time.perf_counter() - started

        return call


def main() -> None:
    options = json.loads(sys.argv[1])
    if "threads" in options:
        torch.set_num_threads(options["threads"])
    if options.get("in_order"):
        batching.balance_ranks = in_order
    run = RunFolder(Path(options["run"]))
    settings = {"precision": "fp32"} | options.get("settings", {})
    if "lora" in settings:
        settings["lora"] = LoraRecipe(**settings["lora"])
    training = TrainingRecipe(epochs=1, batch_size=options["batch_size"], row_tokens=options["row_tokens"], **settings)
    data = DataRecipe(source=options["source"], template="chatml")
    recipe = Recipe(model=options["model"], output=str(run.root), data=data, seed=options["seed"], training=training)
    trainer = make_trainer(recipe, run)
    trainer.args.save_strategy = "no"  # type: ignore[assignment]
    facts = parameters(trainer.model) | {"tokens": sum(map(len, trainer.train_dataset["input_ids"]))}  # type: ignore
    result = Path(options["result"])
    timer = InsideTimer(result, trainer, **facts) if options["inside"] else Timer(result, **facts)
    if "profile_after" in options:  # before the timer, which writes what it finds
        trainer.add_callback(StepProfile(timer.facts, options["profile_after"]))
    if os.environ.get("RANK", "0") == "0":
        trainer.add_callback(timer)
    take_steps(trainer, run)


def in_order(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Deal as many conversations to each process, whatever their lengths, as a sampler does that knows none."""
    return [part.tolist() for part in np.array_split(np.arange(len(lengths)), processes)]


def parameters(model: Any) -> dict[str, int]:
    """Count those that every token is multiplied with, and those of the head, which only supervised tokens meet."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = sum(one.numel() for one in model.parameters() if one is not head and one is not embedding)
    return {"body_parameters": body, "head_parameters": head.numel()}


if __name__ == "__main__":
    main()
