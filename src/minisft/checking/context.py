"""The objects that the checks share: the recipe's tokenizer, rows and model, each created when a check needs it."""

import gc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from minisft.checking.scratch import Steps, choose_steps, make_scratch_run, step_recipe
from minisft.data.conversation import Conversation, Message, messages_from_rows
from minisft.data.encoder import IGNORED, Encoder
from minisft.data.preparation import Prepared, prepare
from minisft.data.prepared import load_split
from minisft.data.shards import encode_sources
from minisft.data.sources import at_revision, parse_sources
from minisft.data.stats import DatasetStats
from minisft.data.verification import VerificationError
from minisft.manifest import delete_scratch_folder
from minisft.models import ResolvedModel, load_config, load_tokenizer, resolve_model
from minisft.planning.auto import predicted_strategy
from minisft.planning.planner import predict_run
from minisft.recipe import Recipe
from minisft.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from minisft.planning.prediction import Prediction
    from minisft.training.batching import PackedRow
    from minisft.training.probe import ProbeResult
    from minisft.training.trainer import SupervisedTokenTrainer


MAX_EXAMPLES = 4000  # rows of the source whose messages are compared with their tokens


@dataclass(frozen=True)
class TokenRow:
    """One prepared row.

    Args:
        ids: Its tokens.
        labels: The same where they are learned, -100 elsewhere.
        findings: Names of what preparation changed in it, such as `cut_cut`.
    """

    ids: list[int]
    labels: list[int]
    findings: tuple[str, ...] = ()

    @property
    def is_cut(self) -> bool:
        return any(name.startswith("cut_") for name in self.findings)

    def answers(self) -> list[tuple[int, int]]:
        """Return (start, end) of every span of learned tokens."""
        learned = np.concatenate([[False], np.asarray(self.labels) != IGNORED, [False]])
        edges = np.flatnonzero(np.diff(learned.astype(np.int8)))
        return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class SourceRows:
    """Rows of the source.

    Args:
        rows: The rows in order, with messages, ids and labels.
        skipped: Number of rows that were skipped, by reason.
    """

    rows: list[dict[str, Any]]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Example:
    """A conversation of the source with its row of the training data.

    Args:
        conversation: The conversation; a row that is truncated, or that teaches one answer, has only a part of it.
        row: Its row of `<output>/dataset`.
        answer: Number of the one answer that the row teaches; None for a conversation in one row.
    """

    conversation: Conversation
    row: TokenRow
    answer: int | None = None

    @property
    def learned(self) -> tuple[Message, ...]:
        """The answers that must be learned."""
        return tuple(message for message in self.conversation.answers if message.supervised)

    @property
    def is_plain(self) -> bool:
        """True where its answers are only text, without calls or reasoning, whose form depends on the template."""
        return not any(
            answer.tool_calls or answer.reasoning or "</think>" in answer.content
            for answer in self.conversation.answers
        )


class CheckContext:
    """A recipe that is checked.

    Args:
        recipe: The recipe.
        run: Its run folder; the checks train in a scratch folder inside it.
    """

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        self.recipe = recipe
        self.run = run
        self.scratch = run.scratch
        self.verification_error: VerificationError | None = None  # raised by `prepare` on its own tokens
        self.live: SupervisedTokenTrainer | None = None
        self.probed: ProbeResult | None = None  # of the live trainer's model

    # --- model and tokenizer

    @cached_property
    def model(self) -> ResolvedModel:
        return resolve_model(self.recipe.model, self.recipe.trust_remote_code, weights=False)

    @cached_property
    def encoder(self) -> Encoder:
        tokenizer = load_tokenizer(self.model.folder, self.recipe.trust_remote_code)
        return Encoder(tokenizer, self.recipe.data.template, self.recipe.data.template_options)

    @cached_property
    def width(self) -> int:
        """Width of the model's layers."""
        config = load_config(self.model.folder, self.recipe.trust_remote_code)
        return int(getattr(config.get_text_config(), "hidden_size", 512))

    @cached_property
    def controls(self) -> dict[str, int]:
        """Ids of the control tokens by name: special tokens, and other added tokens that the template writes."""
        tokenizer = self.encoder.tokenizer
        added = tokenizer.added_tokens_decoder.items()
        written = {
            str(token.content): id
            for id, token in added
            if token.special or token.content in self.encoder.chat_template
        }
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        return {name: id for name, id in {**named, **written}.items() if name.strip()}

    @cached_property
    def saved_tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer as training saves it, with the template, and as other tools then load it."""
        tokenizer = load_tokenizer(self.model.folder, self.recipe.trust_remote_code)
        tokenizer.chat_template = self.encoder.chat_template
        tokenizer.save_pretrained(self.scratch / "tokenizer")
        return load_tokenizer(self.scratch / "tokenizer", self.recipe.trust_remote_code)

    # --- data

    @cached_property
    def source(self) -> "SourceRows":
        """Rows of the source with their tokens, encoded separately, since train rows do not keep their messages.

        Rows that the template refuses are skipped and counted by reason.
        """
        limit = min(self.recipe.data.limit or MAX_EXAMPLES, MAX_EXAMPLES)
        data = replace(self.recipe.data, limit=limit, verify=False)
        stats, path = DatasetStats(), self.scratch / "source.arrow"
        sources = [at_revision(source, None, keep=False) for source in parse_sources(data.source)]
        path.parent.mkdir(exist_ok=True)
        encode_sources(path, sources, replace(self.recipe, data=data), self.encoder, stats)
        with path.open("rb") as file:
            rows = pa.ipc.open_stream(file).read_all().to_pylist()
        return SourceRows(rows, stats.section("skipped"))

    @cached_property
    def prepared(self) -> Prepared:
        """The data set of the training.

        Where `prepare` finds a wrong token, the data set is prepared again without verification, in a scratch folder
        that training does not read, so that the checks can find out what is wrong.
        """
        try:
            return prepare(self.recipe, encoder=self.encoder, begun=self.run.has_begun())
        except VerificationError as error:
            self.verification_error = error
            unverified = replace(self.recipe.data, verify=False)
            temporary = replace(self.recipe, output=str(self.scratch / "unverified"), data=unverified)
            return prepare(temporary, encoder=self.encoder)

    @cached_property
    def splits(self) -> dict[str, Any]:
        """The prepared splits by name, each a `datasets.Dataset`."""
        return {split: load_split(self.prepared.folder.parent, split) for split in ("train", "test")}

    @cached_property
    def examples(self) -> list[Example]:
        """Conversations of the source with their rows of the prepared data."""
        rows: dict[tuple[str, int | None], TokenRow] = {}
        locations = {row["location"] for row in self.source.rows}
        for data in self.splits.values():
            wanted = ("location", "input_ids", "labels", "findings", "answer")
            for row in data.select_columns([name for name in wanted if name in data.column_names]):
                if row["location"] in locations:
                    rows[row["location"], row.get("answer")] = as_token_row(row)
        paired = ((example, rows.get(_key(example))) for example in self.examples_of(self.source.rows))
        return [replace(example, row=row) for example, row in paired if row is not None]

    def examples_of(self, rows: Iterable[dict[str, Any]]) -> Iterator[Example]:
        """Yield the rows of a data set as examples; the last row of each conversation must have its messages."""
        unrolled = self.prepared.ledger.get("unrolled", {})
        waiting: list[dict[str, Any]] = []
        for row in rows:
            waiting.append(row)
            if row["messages"] is None:
                continue
            conversation = as_conversation(row)
            for part in waiting:
                beginning = conversation
                if part.get("answer") is not None:
                    place = [i for i, m in enumerate(conversation.messages) if m.is_answer][part["answer"] - 1]
                    messages = conversation.messages[: place + 1]
                    beginning = replace(conversation, messages=messages).supervise("last")
                elif unrolled.get("answers_left_out"):
                    beginning = conversation.without_loss(self.encoder.render(conversation).left_out)
                yield Example(beginning, as_token_row(part), part.get("answer"))
            waiting.clear()

    def sample(self, count: int) -> list[Example]:
        """Return about `count` of the examples, at even distances."""
        step = max(1, len(self.examples) // count)
        return list(itertools.islice(self.examples[::step], count))

    # --- steps in scratch runs

    @cached_property
    def strategy(self) -> str:
        """The strategy of the recipe; for `auto`, the strategy that the plan chooses.

        Raises:
            UserError: Nothing fits; the fix names changes that would fit.
        """
        chosen = self.recipe if self.recipe.training.strategy != "auto" else predicted_strategy(self.recipe)
        return chosen.training.strategy

    @cached_property
    def steps(self) -> Steps:
        return choose_steps(self.recipe.training, self.splits["train"])

    @cached_property
    def chosen_recipe(self) -> Recipe:
        """Recipe of the scratch run that takes the steps under the recipe's own strategy and processes."""
        recipe = step_recipe(self.recipe, self.scratch / "steps", self.steps, strategy=self.strategy)
        make_scratch_run(recipe, self.splits["train"], self.steps.rows)
        return recipe

    @property
    def chosen_run(self) -> RunFolder:
        return RunFolder(Path(self.chosen_recipe.output))

    @cached_property
    def reference_recipe(self) -> Recipe:
        """Recipe of the scratch run that takes the same steps on one process, without a strategy."""
        batch = self.steps.conversations
        folder = self.scratch / "reference"
        recipe = step_recipe(
            self.recipe, folder, self.steps, strategy="vanilla", processes=1, sequence_parallel=1, batch_size=batch
        )
        make_scratch_run(recipe, self.splits["train"], self.steps.rows)
        return recipe

    @cached_property
    def predictions(self) -> "tuple[Prediction, Prediction]":
        """The plan's predictions for the scratch run and for the full run."""
        training = replace(self.recipe.training, strategy=self.strategy)  # type: ignore[arg-type]
        return predict_run(self.chosen_recipe), predict_run(replace(self.recipe, training=training))

    def take_steps(self, recipe: Recipe) -> None:
        """Take the steps of a scratch recipe in separate processes, as `train` would start them.

        Raises:
            UserError: A process raised it.
            WorkerError: A process failed for another reason.
            StoppedError: The steps were asked to stop.
        """
        from minisft.checking.scratch import run_steps_in_child

        run_steps_in_child(recipe)

    def loss_of(self, row: "PackedRow") -> float:
        """Return the training's loss of a row, summed over its learned tokens, with the live model."""
        from minisft.training.loss import row_loss

        assert self.live is not None
        assert self.live.model is not None
        self.live.model.eval()
        with torch.no_grad():
            return float(row_loss(self.live.model, row.to(self.live.args.device), self.live.call))

    def train_in_scratch(self, recipe: Recipe) -> "SupervisedTokenTrainer":
        """Create a trainer of a scratch recipe in this process, after the memory of the previous one is freed."""
        from minisft.training.run_training import make_trainer

        self.free_model()
        self.live = make_trainer(recipe, RunFolder(Path(recipe.output)))
        return self.live

    def free_model(self) -> None:
        """Free the live model."""
        if self.live is not None:
            self.live = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def clear(self) -> None:
        """Delete what the checks wrote."""
        self.free_model()
        delete_scratch_folder(self.scratch)


def _key(example: Example) -> tuple[str, int | None]:
    return example.conversation.location, example.answer


def as_token_row(row: dict[str, Any]) -> TokenRow:
    findings = tuple(name for name in (row.get("findings") or "").split(",") if name)
    return TokenRow(list(row["input_ids"]), list(row["labels"]), findings)


def as_conversation(row: dict[str, Any]) -> Conversation:
    return Conversation(messages_from_rows(row["messages"]), row["id"], row["location"], row["tools"] or "")


def flat_columns(data: Any, name: str) -> Iterator[np.ndarray]:
    """Yield the values of a list column of a `datasets.Dataset`, for each chunk all rows end to end."""
    for chunk in data.data.column(name).chunks:
        yield chunk.flatten().to_numpy()


def shown(items: Sequence[object], most: int = 3) -> str:
    """Return the first items as text, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
