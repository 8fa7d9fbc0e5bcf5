"""The learning-rate range test: one short run whose rate rises, to find where training begins and where it diverges.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186), section 3.3; the rate rises by a
factor at every step, so that each decade has about as many steps. Batch, optimizer, clipping and data are those of
the recipe. The run takes place in a temporary folder, and neither a checkpoint nor a model is written.
"""

import gc
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from minisft.console import waiting
from minisft.data.sources import require_sources
from minisft.errors import StoppedError, UserError
from minisft.recipe import Recipe
from minisft.run_start import open_run
from minisft.runner import prepare_run
from minisft.training.callbacks import listen_for_stop
from minisft.training.checkpoints import explain_failed_writes
from minisft.training.run_training import make_trainer, require_feasible

# The highest rate, and the decades below it. LoRA's best rate is about ten times that of all weights: Schulman and
# Thinking Machines Lab 2025, "LoRA Without Regret".
_HIGHEST, _HIGHEST_LORA, _DECADES = 1e-1, 1.0, 5
SECONDS = 80.0  # default duration of the steps; loading a model of 135M parameters takes a few seconds more
_FEWEST_STEPS, _MOST_STEPS = 16, 100
_DIVERGED = 1.5  # diverged: the smoothed loss is this many times its lowest value so far
_WEIGHTS = np.array([1.0, 2.0, 3.0, 2.0, 1.0])  # of the smoothing, which looks both ways so that nothing is delayed
_FALLEN = 0.1  # the loss falls once it has fallen by this share of its whole fall
_LEAST_FALL = 0.02  # a fall of less than this share of the loss is noise


@dataclass(frozen=True)
class LearningRateRange:
    """What a learning-rate range test measured.

    Args:
        rates: Learning rate of each step, rising.
        losses: Mean loss per supervised token of each step's batch, before the update with its rate, in nats; nan where
            it was not finite, which ends the test.
        smoothed: `losses`, each averaged with its neighbours.
        divergence: The rate from which the loss rises without return; None if it did not diverge up to the highest.
        low: Lower end of the suggested bracket; None if the loss fell at no rate.
        high: Upper end of the suggested bracket, with `low` between one and two decades below it.
        seconds: Duration of the steps.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    divergence: float | None
    low: float | None
    high: float | None
    seconds: float

    def __post_init__(self) -> None:
        assert len(self.rates) == len(self.losses) == len(self.smoothed)
        assert (self.low is None) == (self.high is None)


def learning_rate_range(
    recipe: Recipe,
    *,
    low: float | None = None,
    high: float | None = None,
    steps: int | None = None,
    seconds: float = SECONDS,
) -> LearningRateRange:
    """Train for a few steps with a rising learning rate, and suggest a bracket of rates to search.

    Every step has the recipe's global batch. A recipe for several processes or a ZeRO stage runs in this process, with
    the same global batch, and so takes the same steps; the model must fit into one device.

    Args:
        recipe: The recipe; its learning rate, schedule, warm-up and length are replaced. Its output is not touched.
        low: The lowest rate; None: five decades below `high`.
        high: The highest rate, which is not reached if the loss diverges below it; None: 0.1, or 1 with LoRA.
        steps: Number of steps; None: as many as fit into `seconds`, from 16 to 100, so that a slow machine takes fewer.
        seconds: Time for the steps, if `steps` is None.

    Raises:
        UserError: The range is empty, there are too few steps, or the recipe, its data or its model cannot be trained.
        StoppedError: SIGINT or SIGTERM was received.
    """
    high = high if high is not None else _HIGHEST if recipe.training.lora is None else _HIGHEST_LORA
    low = low if low is not None else high / 10**_DECADES
    if not 0 < low < high < math.inf:
        raise UserError("learning-rate range", f"{low:g} to {high:g} is no range", "give 0 < low < high")
    if steps is not None and steps < _FEWEST_STEPS:
        raise UserError("steps", f"{steps} steps are too few to see a trend", f"give at least {_FEWEST_STEPS}")
    with tempfile.TemporaryDirectory(prefix="minisft-") as folder:
        short = _short_recipe(recipe, Path(folder) / "run", low, steps or _MOST_STEPS)
        require_feasible(short)
        require_sources(short.data)
        with open_run(short) as run:
            prepare_run(short, with_weights=False, output=Path(recipe.output))
            callback = _RisingRate(low, high, steps, seconds)
            trainer = make_trainer(short, run)
            trainer.args.save_strategy = "no"
            trainer.add_callback(callback)
            with (
                waiting("learning-rate range test"),
                explain_failed_writes(run.root),
                listen_for_stop() as trainer.stop,
            ):
                try:
                    trainer.train()
                except UserError as error:
                    if error.where != f"step {trainer.state.global_step + 1}":
                        raise
                    callback.losses.append(math.nan)  # the trainer refuses a loss that is not finite
            stopped, taken = trainer.stops_here, callback.seconds
            trainer.accelerator.free_memory()
            del trainer
            gc.collect()
    if stopped:
        raise StoppedError("the learning-rate range test stopped as asked; it leaves nothing behind")
    return find_bracket(callback.rates, callback.losses, seconds=taken)


def find_bracket(rates: list[float], losses: list[float], seconds: float = 0.0) -> LearningRateRange:
    """Return the divergence point and a bracket of rates from the losses of a range test.

    The bracket ends at the rate of the lowest smoothed loss, beyond which a step does harm, and begins where the loss
    has begun to fall; it spans at least one decade and at most two.

    Args:
        rates: Learning rate of each step, rising.
        losses: Loss of each step; a last one that is not finite is divergence.
        seconds: Duration of the steps.
    """
    finite = np.array([loss for loss in losses if math.isfinite(loss)])
    smoothed = _smooth(finite)
    lowest = np.minimum.accumulate(smoothed) if len(smoothed) else smoothed
    beyond = np.flatnonzero(smoothed > _DIVERGED * lowest)
    divergence = rates[beyond[0]] if len(beyond) else rates[len(finite)] if len(finite) < len(losses) else None
    whole = (tuple(rates), tuple(losses), (*map(float, smoothed), *[math.nan] * (len(losses) - len(finite))))
    best = int(np.argmin(smoothed)) if len(smoothed) else 0
    fall = smoothed[0] - smoothed[best] if len(smoothed) else 0.0
    if best == 0 or fall < _LEAST_FALL * smoothed[0]:
        return LearningRateRange(*whole, divergence, None, None, seconds)
    begun = int(np.flatnonzero(smoothed[: best + 1] <= smoothed[0] - _FALLEN * fall)[0])
    high = rates[best]
    return LearningRateRange(*whole, divergence, min(max(rates[begun], high / 100), high / 10), high, seconds)


def range_lines(result: LearningRateRange) -> list[str]:
    """Return the result of a range test as lines of text, with a row for each of about a dozen steps."""
    last = len(result.rates) - 1
    shown = sorted({round(index) for index in np.linspace(0, last, min(last + 1, 12))})
    lines = [f"learning-rate range test: {last + 1} steps, {result.seconds:.0f} s"]
    for index in shown:
        rate, loss, smooth = (values[index] for values in (result.rates, result.losses, result.smoothed))
        lines.append(f"  rate {rate:.1e}  loss {loss:.4f}  smoothed {smooth:.4f}")
    if result.divergence is None:
        lines.append(f"no divergence up to {result.rates[-1]:.1e}")
    else:
        lines.append(f"diverges at {result.divergence:.1e}")
    if result.low is None or result.high is None:
        lines.append("no bracket: the loss fell at no rate; give a wider range or more steps")
    else:
        bracket = f"{result.low:.1e}..{result.high:.1e}"
        lines.append(f"suggested bracket: {bracket}, as in --vary training.learning_rate={bracket}")
    return lines


def _short_recipe(recipe: Recipe, folder: Path, rate: float, steps: int) -> Recipe:
    """Return the recipe of the test: in this process, with the same global batch, `steps` long."""
    own = recipe.training
    training = replace(
        own, strategy="vanilla", processes=1, sequence_parallel=1,
        gradient_accumulation=own.gradient_accumulation * own.replicas,
        offload=None, max_steps=steps, learning_rate=rate, scheduler="constant", scheduler_args={}, warmup_ratio=0.0,
        save_every=steps, keep_checkpoints=None, log_every=1, eval_every=None, early_stopping=None,
        early_stopping_by="loss", report_to=[],
    )  # fmt: skip
    return replace(recipe, output=str(folder), training=training)


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Return the weighted mean of each loss and its neighbours, (steps,); at the ends there are fewer of them."""
    if not len(losses):
        return losses
    reach = len(_WEIGHTS) // 2
    padded, present = np.pad(losses, reach), np.pad(np.ones(len(losses)), reach)
    return np.convolve(padded, _WEIGHTS, "valid") / np.convolve(present, _WEIGHTS, "valid")


class _RisingRate(TrainerCallback):
    """Set the learning rate of each step, collect its loss, and end the run at the highest rate or at divergence.

    Args:
        low: Rate of the first step.
        high: Rate of the last step.
        steps: Number of steps, or None: as many as the time allows, estimated again before each step.
        seconds: Time for all steps, if `steps` is None.
    """

    def __init__(self, low: float, high: float, steps: int | None, seconds: float) -> None:
        self.rate, self.high, self.steps, self.budget = low, high, steps, seconds
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._started = self._second = time.perf_counter()
        self._left = 0  # steps that are still to take, the one that begins among them

    @property
    def seconds(self) -> float:
        """Time since the first step."""
        return time.perf_counter() - self._started

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        done = state.global_step
        if done == 0:
            self._started = time.perf_counter()
        if done == 1:
            self._second = time.perf_counter()  # the first step prepares what later ones use, and is not timed
        self._left = self._count_left(done)
        if done > 0:
            self.rate = self.high if self._left == 1 else self.rate * (self.high / self.rate) ** (1 / self._left)
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        self.rates.append(self.rate)

    def _count_left(self, done: int) -> int:
        if self.steps is not None or done < 2:
            return (self.steps or _MOST_STEPS) - done
        pace = (time.perf_counter() - self._second) / (done - 1)
        affordable = int((self.budget - self.seconds) / max(pace, 1e-6))
        return max(1, _FEWEST_STEPS - done, min(affordable, _MOST_STEPS - done))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            smoothed = _smooth(np.array(self.losses))
            control.should_training_stop |= bool(smoothed[-1] > _DIVERGED * smoothed.min())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self._left == 1
