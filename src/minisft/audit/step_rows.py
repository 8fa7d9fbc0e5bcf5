"""Which rows made the loss of a step: the step is replayed, and its rows are ranked by loss and by gradient norm.

Loss per row comes from the replayed step itself. Gradient norms and the losses of tokens are computed with the weights
before the step, one row at a time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisft.audit.replay import (
    Start,
    announcement,
    nearest_start,
    replay,
    replay_recipe,
    rows_of_step,
    scratch_run,
)
from minisft.checking.scratch import quiet_consoles, quiet_libraries
from minisft.console import say, waiting
from minisft.data.inspect import token_texts
from minisft.data.prepared import load_train
from minisft.errors import UserError
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import Recipe
from minisft.row_losses import read_row_losses
from minisft.run_folder import RunFolder, read_metrics, step_of
from minisft.training.batching import RowDataset, RowPlan, measure_lengths
from minisft.training.loss import row_losses
from minisft.training.run_training import make_trainer


@dataclass(frozen=True)
class ReportedToken:
    """A token of a row.

    Args:
        text: Its text.
        loss: Its loss in nats; None where it is not supervised, or no loss was computed.
        shared: Whether it is in a piece that another row has too.
    """

    text: str
    loss: float | None
    shared: bool = False


@dataclass(frozen=True)
class RowReport:
    """A training row.

    Args:
        row: Number of the row in dataset/train.
        id: Id of its conversation.
        location: Place in the source, such as "file:line".
        supervised: Number of its supervised tokens.
        loss: Mean loss of its supervised tokens in nats.
        grad_norm: L2 norm of the gradient of that mean; None if it was not computed.
        tokens: Its tokens with their losses.
        similarity: Share of the pieces of a test row that this row has too, from 0 to 1; None for other questions.
        excess: Its last loss minus the median loss of the rows that were seen at that time, in nats; None for other
            questions.
    """

    row: int
    id: str
    location: str
    supervised: int
    loss: float | None
    grad_norm: float | None
    tokens: tuple[ReportedToken, ...] = ()
    similarity: float | None = None
    excess: float | None = None

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": self.id,
            "location": self.location,
            "loss": finite(self.loss),
            "grad_norm": finite(self.grad_norm),
            "row": self.row,
            "supervised": self.supervised,
        }
        more = {"similarity": self.similarity, "excess": self.excess}
        return found | {name: finite(value) for name, value in more.items() if value is not None}


def finite(value: float | None) -> float | None:
    """Return a number, or None for one that JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class StepReport:
    """A replayed step.

    Args:
        step: Number of the step.
        start: Step after which the replay began.
        replayed: Whether the replay gave the same bits as the run: the loss of the step and of each row.
        logged: Loss of the step as the run logged it; None: it was not logged.
        loss: Loss of the replayed step in nats per supervised token.
        loss_without_worst: That loss without the first of `rows`; None for a step of one row.
        rows: The rows of the step, those with the highest loss first.
    """

    step: int
    start: int
    replayed: bool
    logged: float | None
    loss: float
    loss_without_worst: float | None
    rows: tuple[RowReport, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "replayed": self.replayed,
            "loss": finite(self.loss),
            "logged_loss": finite(self.logged),
            "loss_without_worst": finite(self.loss_without_worst),
            "start": self.start,
            "rows": [row.as_dict() for row in self.rows],
        }


def explain_step(recipe: Recipe, step: int) -> StepReport:
    """Replay a step of a run, and rank its rows.

    Raises:
        UserError: The run did not take that step, or this machine cannot replay it.
        StoppedError: SIGINT or SIGTERM came.
    """
    run = RunFolder(Path(recipe.output))
    kept = _require_step(run, step)
    start = nearest_start(run, step)
    # Rows are run alone, forward and backward, which takes about two steps.
    say(announcement(run, start, step, more=2) + _nearer_start(run, recipe, start, step))
    with scratch_run(run) as scratch:
        with waiting("replaying"):
            replayed = replay(run, recipe, scratch, start, step, with_weights=True)
        records = replayed.rows_of(step)
        with waiting("computing gradients of the rows"):
            rows = list(_measure_rows(run, recipe, scratch, replayed.weights, records, step))
    norm = replayed.metrics.get(step - 1, {}).get("grad_norm")
    if norm is not None and not math.isfinite(norm):
        say(f"note: the gradient norm of step {step - 1} is {norm}, so the weights before step {step} are invalid")
    rows.sort(key=lambda row: (-_sort_key(row.loss), -_sort_key(row.grad_norm)))
    logged = {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}.get(step)
    same_loss = logged is None or logged == replayed.metrics.get(step, {}).get("loss")
    same_rows = records.tobytes() == kept.tobytes()
    total, others = _mean(rows), _mean(rows[1:])
    loss = replayed.metrics[step]["loss"] if step in replayed.metrics else total
    return StepReport(
        step, start.step, same_loss and same_rows, logged, loss, others if len(rows) > 1 else None, tuple(rows)
    )


def _require_step(run: RunFolder, step: int) -> np.ndarray:
    """Return the records of a step.

    Raises:
        UserError: The run did not take it.
    """
    records = read_row_losses(run.row_losses)
    found = rows_of_step(records, step)
    if not len(found):
        last = int(records["step"].max()) if len(records) else 0
        fix = f"give a step from 1 to {last}" if last else "train the run first"
        raise UserError("--step", f"this run took no step {step}", fix)
    return found


def _nearer_start(run: RunFolder, recipe: Recipe, start: Start, step: int) -> str:
    """Return in parentheses how the replay of a step could start nearer to it; "" if nothing would help."""
    nearer = [path.name for path in run.list_checkpoints() if start.step < step_of(path) < step]
    if nearer:
        return f" ({nearer[-1]} has no optimizer state any more; training.keep_optimizer: all keeps it)"
    if recipe.training.keep_optimizer != "all" and step - start.step > 1:
        return " (a smaller training.save_every with training.keep_optimizer: all makes it shorter)"
    return ""


def _measure_rows(
    run: RunFolder, recipe: Recipe, scratch: RunFolder, weights: Path | None, records: np.ndarray, step: int
) -> Iterator[RowReport]:
    """Yield the rows of a step with their gradient norms and token losses under the weights before it."""
    one = replay_recipe(run, recipe, step, scratch.root)
    batch = one.training.global_batch
    alone = {"strategy": "vanilla", "processes": 1, "batch_size": batch, "gradient_accumulation": 1, "offload": None,
             "sequence_parallel": 1}  # fmt: skip
    one = replace(one, training=replace(one.training, **alone))  # type: ignore[arg-type]
    data = load_train(run.root)
    sizes, dataset = measure_lengths(data), RowDataset(data)
    tokenizer = load_tokenizer(resolve_model(recipe.model, recipe.trust_remote_code).folder, recipe.trust_remote_code)
    with quiet_consoles(), quiet_libraries():
        trainer = make_trainer(one, scratch)
        if weights is not None:
            trainer._load_from_checkpoint(str(weights))
        trainer.prepare_weights()
        trainer.probe()
        model: Any = trainer.model
        model.eval()  # dropout would draw other numbers than the step did
        for record in records:
            number = int(record["row"])
            packed, _ = dataset[RowPlan((number,), (number,), 0, 0)]
            with trainer.compute_loss_context_manager():
                total, losses = row_losses(model, packed.to(trainer.args.device), trainer.call)
            (total / len(losses)).backward()
            norm = _gradient_norm(trainer.trained_parameters())
            trainer.clear_gradients()
            row = data[number]
            by_place = dict(zip((packed.predict_at + 1).tolist(), losses.tolist(), strict=True))
            texts = token_texts(row["input_ids"], tokenizer)
            tokens = tuple(ReportedToken(text, by_place.get(place)) for place, text in enumerate(texts))
            yield RowReport(
                number, row["id"], row["location"], int(sizes.supervised[number]), float(record["loss"]), norm, tokens
            )


def _gradient_norm(trained: Sequence[torch.nn.Parameter]) -> float:
    squares = [torch.linalg.vector_norm(one.grad, dtype=torch.float64) ** 2 for one in trained if one.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def _sort_key(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


def _mean(rows: Sequence[RowReport]) -> float:
    """Return the mean loss of the supervised tokens of rows."""
    tokens = sum(row.supervised for row in rows)
    return sum((row.loss or 0.0) * row.supervised for row in rows) / tokens if tokens else math.nan
