"""Can the model overfit a small batch: a few rows are learned until their answers come back verbatim."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from minisft.checking.context import CheckContext, TokenRow
from minisft.checking.reference import Conversations, count_learned, padded_loss, plain_attention
from minisft.checking.result import Failed
from minisft.checking.scratch import Steps, make_scratch_run, short_rows, step_recipe, switch_off_dropout
from minisft.evaluation.generation import generate
from minisft.training.batching import measure_lengths

if TYPE_CHECKING:
    from minisft.recipe import Recipe


ROWS, CANDIDATES = 3, 24
NEAR_ZERO = 0.02  # nats per learned token
CONFIDENT = 0.6  # nats of all learned tokens together: below ln 2 each of them is likelier than all others
MOST_STEPS = 400  # a tiny random model may need 150, a real one 10
# AdamW moves every weight by about the learning rate; what a weight may move falls with the width of the layer.
_RATE_TIMES_WIDTH = 0.3


def can_overfit_batch(context: CheckContext, max_steps: int = MOST_STEPS) -> str:
    """Train on the shortest rows until the loss is near zero, at most `max_steps`, and generate their answers."""
    rows = _shortest_rows(context)
    recipe = _recipe(context, len(rows), max_steps)
    make_scratch_run(recipe, context.splits["train"], rows)
    trainer = context.train_in_scratch(recipe)
    switch_off_dropout(trainer.model)
    trainer.args.save_strategy = "no"
    dataset: Any = trainer.train_dataset
    watch = _StopWhenLearned([(row["input_ids"], row["labels"]) for row in dataset])
    trainer.add_callback(watch)
    trainer.train()
    if not watch.is_learned:
        problem = f"after {max_steps} steps on {len(rows)} rows their loss is {watch.loss:.3f}, from {watch.first:.3f}"
        raise Failed(problem, "this model does not learn as it is loaded here: look at its config, or take another")
    answers = _recall(context, trainer.model, [_as_row(row) for row in dataset])
    return (
        f"{len(rows)} rows, {watch.steps} steps: loss {watch.first:.2f} to {watch.loss:.3f}, {answers} answers verbatim"
    )


def _shortest_rows(context: CheckContext) -> list[int]:
    """Short rows of which no two ask the same first: two answers to one question cannot both be learned."""
    train = context.splits["train"]
    chosen: dict[tuple[int, ...], int] = {}
    for number in short_rows(measure_lengths(train).tokens, CANDIDATES):
        row = _as_row(train[number])
        chosen.setdefault(tuple(row.ids[: row.answers()[0][0]]), number)
    return list(chosen.values())[:ROWS]


def _recipe(context: CheckContext, rows: int, max_steps: int) -> "Recipe":
    rate = _RATE_TIMES_WIDTH / context.width
    return step_recipe(
        context.recipe, context.scratch / "learning", Steps(rows, []),
        strategy="vanilla", processes=1, batch_size=rows, max_steps=max_steps, save_every=max_steps,
        learning_rate=rate, scheduler="constant", scheduler_args={}, weight_decay=0.0, optimizer="adamw",
    )  # fmt: skip


class _StopWhenLearned(TrainerCallback):
    """End the training when the rows are learned: by the weights as they are then, since the last update may spoil it.

    Args:
        rows: (input ids, labels) of each.
    """

    def __init__(self, rows: Conversations) -> None:
        self.rows = rows
        self.first = self.loss = float("nan")
        self.steps = 0
        self.is_learned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.first = logs["loss"] if self.steps == 0 else self.first
        self.loss, self.steps = logs["loss"], state.global_step
        if self.loss <= NEAR_ZERO:
            with torch.no_grad(), plain_attention(model):
                together = float(padded_loss(model, self.rows))
            self.loss = together / count_learned(self.rows)
            self.is_learned = self.loss <= NEAR_ZERO and together <= CONFIDENT
        control.should_training_stop = self.is_learned


def _as_row(row: dict[str, Any]) -> TokenRow:
    return TokenRow(list(row["input_ids"]), list(row["labels"]))


def _recall(context: CheckContext, model: Any, rows: list[TokenRow]) -> int:
    """Generate every answer of the rows from what stands before it; return how many there are."""
    asked = [(row.ids[:start], row.ids[start:end]) for row in rows for start, end in row.answers() if start > 0]
    stops = context.encoder.stop_token_ids
    model.eval()
    with plain_attention(model), torch.inference_mode():
        answers = generate(
            model,
            [prompt for prompt, _ in asked],
            stop_token_ids=stops,
            max_new_tokens=max(len(answer) for _, answer in asked) + 8,
        )
    for answer, (_, wanted) in zip(answers, asked, strict=True):
        ends = wanted[-1] in stops
        text = wanted[:-1] if ends else wanted
        if answer.ids[: len(text)] != text or (ends and (answer.ids != text or answer.finish != "stop")):
            decode = context.encoder.decode_answer
            problem = f"learned {decode(text)!r}, generated {decode(answer.ids)!r} (ended by {answer.finish})"
            raise Failed(problem, "generation does not continue what was trained: report it")
    return len(asked)
