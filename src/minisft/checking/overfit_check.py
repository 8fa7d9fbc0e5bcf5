"""Check of learning: the model can overfit a few rows until it generates their answers verbatim."""

from typing import Any

import torch
from transformers import TrainerCallback

from minisft.checking.context import CheckContext, TokenRow
from minisft.checking.reference import Conversations, count_learned, padded_loss
from minisft.checking.result import Failed
from minisft.checking.scratch import Steps, make_scratch_run, short_rows, step_recipe, switch_off_dropout
from minisft.evaluation.generation import generate
from minisft.models import transformers_attention
from minisft.training.batching import measure_lengths

ROWS, CANDIDATES = 3, 24  # rows that are learned, and rows among which they are chosen
NEAR_ZERO = 0.02  # nats per learned token
CONFIDENT = 0.6  # nats of all learned tokens together: below ln 2, each token is likelier than all others together
MAX_STEPS = 400  # optimizer steps: a tiny random model may need 150, a pretrained model 10
# Learning rate times width of a layer. AdamW moves every weight by about the learning rate, and the step that a weight
# can take without divergence falls with the width of its layer.
_RATE_TIMES_WIDTH = 0.3


def can_overfit_batch(context: CheckContext, max_steps: int = MAX_STEPS) -> str:
    """Train on the shortest rows until the loss is near zero, at most `max_steps`, and generate their answers."""
    # 1. A scratch run whose every step takes the same short rows.
    rows = _shortest_rows(context)
    recipe = step_recipe(
        context.recipe, context.scratch / "learning", Steps(len(rows), []),
        strategy="vanilla", processes=1, sequence_parallel=1, batch_size=len(rows),
        max_steps=max_steps, save_every=max_steps,
        learning_rate=_RATE_TIMES_WIDTH / context.width, scheduler="constant", scheduler_args={}, weight_decay=0.0,
        optimizer="adamw",
    )  # fmt: skip
    make_scratch_run(recipe, context.splits["train"], rows)
    # 2. Train until they are learned.
    trainer = context.train_in_scratch(recipe)
    switch_off_dropout(trainer.model)
    trainer.args.save_strategy = "no"
    dataset: Any = trainer.train_dataset
    callback = _StopWhenLearned([(row["input_ids"], row["labels"]) for row in dataset])
    trainer.add_callback(callback)
    trainer.train()
    first, last = callback.first, callback.loss
    if not callback.is_learned:
        problem = f"after {max_steps} steps on {len(rows)} rows, their loss is {last:.3f}, and was {first:.3f}"
        raise Failed(problem, "the loaded model does not learn: look at its config, or use another model")
    # 3. Generate their answers.
    answers = _compare_generated(context, trainer.model, [_as_row(row) for row in dataset])
    return f"{len(rows)} rows, {callback.steps} steps: loss {first:.2f} to {last:.3f}, {answers} answers verbatim"


def _shortest_rows(context: CheckContext) -> list[int]:
    """Choose short rows with different first prompts: two answers to one prompt cannot both be learned."""
    train = context.splits["train"]
    chosen: dict[tuple[int, ...], int] = {}
    for index in short_rows(measure_lengths(train).tokens, CANDIDATES):
        row = _as_row(train[index])
        chosen.setdefault(tuple(row.ids[: row.answers()[0][0]]), index)
    return list(chosen.values())[:ROWS]


class _StopWhenLearned(TrainerCallback):
    """End the training when the rows are learned.

    A logged loss is that of the weights before the update, which may spoil them, so the loss is computed again.

    Args:
        rows: Input ids and labels of each row.
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
            with torch.no_grad(), transformers_attention(model):
                summed = float(padded_loss(model, self.rows))
            self.loss = summed / count_learned(self.rows)
            self.is_learned = self.loss <= NEAR_ZERO and summed <= CONFIDENT
        control.should_training_stop = self.is_learned


def _as_row(row: dict[str, Any]) -> TokenRow:
    return TokenRow(list(row["input_ids"]), list(row["labels"]))


def _compare_generated(context: CheckContext, model: Any, rows: list[TokenRow]) -> int:
    """Generate every answer of the rows from the tokens before it, compare, and return the number of answers."""
    pairs = [(row.ids[:start], row.ids[start:end]) for row in rows for start, end in row.answers() if start > 0]
    stops = context.encoder.stop_token_ids
    model.eval()
    with transformers_attention(model), torch.inference_mode():
        answers = generate(
            model,
            [prompt for prompt, _ in pairs],
            stop_token_ids=stops,
            max_new_tokens=max(len(answer) for _, answer in pairs) + 8,
        )
    for answer, (_, learned) in zip(answers, pairs, strict=True):
        ends = learned[-1] in stops
        text = learned[:-1] if ends else learned
        if answer.ids[: len(text)] != text or (ends and (answer.ids != text or answer.finish != "stop")):
            decode = context.encoder.decode_answer
            problem = f"learned {decode(text)!r}, generated {decode(answer.ids)!r} (ended by {answer.finish})"
            raise Failed(problem, "report it: generation differs from what was trained")
    return len(pairs)
