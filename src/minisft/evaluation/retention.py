"""Did the model forget? The loss of every model on texts of the user's own, with its difference to the base model."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minisft.data.encoder import IGNORED, Encoder
from minisft.data.formats import RowError, check_order, detect_format, to_conversation
from minisft.data.renderers.base import RefusedError
from minisft.data.sources import parse_sources, read_source
from minisft.errors import UserError
from minisft.evaluation.backends import LossTask, ModelSpec, Workers
from minisft.evaluation.metrics import LossRow
from minisft.evaluation.resampling import percentile_interval, resampled_rows
from minisft.evaluation.result_files import ResultCache
from minisft.results import MIN_CONVERSATIONS

_KEY = "evaluation.retain"


@dataclass(frozen=True)
class RetainedText:
    """One text or conversation.

    Args:
        location: Its file and line.
        rows: Its (input ids, labels): one row, or several for a plain text that is longer than a row may be.
    """

    location: str
    rows: tuple[LossRow, ...]

    @cached_property
    def fingerprints(self) -> list[str]:
        return [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:24] for row in self.rows]

    @cached_property
    def tokens(self) -> list[int]:
        """Number of tokens of each row that the loss is a mean of."""
        return [sum(label != IGNORED for label in labels[1:]) for _, labels in self.rows]


@dataclass(frozen=True)
class RetainedTexts:
    """The texts of `evaluation.retain`.

    Args:
        path: The file.
        texts: The texts, in order.
    """

    path: Path
    texts: list[RetainedText]

    def as_dict(self) -> dict[str, Any]:
        """Return what results.json says of the texts."""
        return {
            "file": self.path.name,
            "texts": len(self.texts),
            "tokens": sum(sum(text.tokens) for text in self.texts),
        }

    def _rows(self) -> dict[str, LossRow]:
        """Return each row once, by its fingerprint."""
        return {key: row for text in self.texts for key, row in zip(text.fingerprints, text.rows, strict=True)}

    def is_in(self, cache: ResultCache) -> bool:
        """Return whether the cache has the losses of all texts."""
        return all(cache.has_loss(key) for key in self._rows())

    def compute(self, workers: Workers, spec: ModelSpec, cache: ResultCache) -> None:
        """Compute the losses that the cache lacks: each row alone, since a loss of its own is needed."""
        missing = {key: row for key, row in self._rows().items() if not cache.has_loss(key)}
        keys = list(missing)
        for outcome in workers.perform(spec, [LossTask([row]) for row in missing.values()]):
            total, tokens = outcome.value
            loss = total / tokens
            cache.add_loss(keys[outcome.task], loss if math.isfinite(loss) else None, outcome.seconds)

    def loss(self, cache: ResultCache) -> "RetainedLoss":
        """Return the losses of a model, all of which are in the cache."""
        sums = []
        for text in self.texts:
            means = [cache.loss(key) for key in text.fingerprints]
            sums.append(sum((math.nan if m is None else m) * n for m, n in zip(means, text.tokens, strict=True)))
        return RetainedLoss(np.array(sums, dtype="float64"), np.array([sum(text.tokens) for text in self.texts]))


@dataclass(frozen=True)
class RetainedLoss:
    """A model's losses on the texts.

    Args:
        sums: Summed loss of each text, in nats [texts].
        tokens: Number of tokens that each sum is over [texts].
    """

    sums: np.ndarray
    tokens: np.ndarray

    @cached_property
    def resamples(self) -> np.ndarray:
        """Mean losses [1000] of seeded resamples of the texts; the same texts for every model."""
        draws = resampled_rows(len(self.sums))
        return np.array(self.sums[draws].sum(axis=1) / self.tokens[draws].sum(axis=1))

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.sums.sum() / self.tokens.sum())

    def as_dict(self, base: "RetainedLoss | None" = None) -> dict[str, Any]:
        """Return the entry of results.json: loss, 95 % bootstrap interval over texts, and the difference to `base`."""
        entry: dict[str, Any] = {"tokens": int(self.tokens.sum()), "texts": len(self.sums)}
        if len(self.sums) < MIN_CONVERSATIONS:
            entry["reliable"] = False
        if not math.isfinite(self.mean):
            return {"loss": None, "low": None, "high": None, **entry}
        low, high = percentile_interval(self.resamples)
        entry = {"loss": self.mean, "low": low, "high": high, **entry}
        if base is not None and math.isfinite(base.mean):
            low, high = percentile_interval(self.resamples - base.resamples)
            entry["difference"] = {"loss": self.mean - base.mean, "low": low, "high": high}
        return entry


def load_retained(path: str, encoder: Encoder, longest: int) -> RetainedTexts:
    """Read the file of `evaluation.retain`: conversations in any format of `data.source`, and lines {"text": ...}.

    Args:
        path: The file.
        encoder: Encoder of the run's template.
        longest: The most tokens of a row. A longer plain text is divided into several rows, each of which begins
            without the text before it; a longer conversation is an error.

    Raises:
        UserError: The file cannot be read or holds nothing, or a row is neither text nor conversation, is too long, or
            has nothing to compute a loss on; the message names its line.
    """
    if not Path(path).is_file():
        problem = f"{path} is not a file"
        raise UserError(_KEY, problem, 'give a file of conversations, or of lines {"text": "..."}')
    [source] = parse_sources(path, _KEY)
    texts = []
    for chunk in read_source(source, 0):
        for location, row in chunk.parsed():
            rows = tuple(_encode(row, location, encoder, longest))
            text = RetainedText(location, rows)
            if not sum(text.tokens):
                raise UserError(location, "there is no token to compute a loss on", "remove the row")
            texts.append(text)
    if not texts:
        raise UserError(path, "there is no text in this file", 'write a conversation or {"text": "..."} in each line')
    return RetainedTexts(Path(path), texts)


def _encode(row: Any, location: str, encoder: Encoder, longest: int) -> Iterator[LossRow]:
    if isinstance(row, dict) and isinstance(row.get("text"), str) and detect_format(row) is None:
        try:
            row["text"].encode()
        except UnicodeEncodeError:
            problem = "the text holds half of a surrogate pair, which UTF-8 cannot write"
            raise UserError(location, problem, "correct the text") from None
        ids = encoder.encode_text(row["text"])
        has_bos = bool(ids) and ids[0] == encoder.tokenizer.bos_token_id
        before, rest = (ids[:1], ids[1:]) if has_bos else ([], ids)
        room = longest - len(before)
        for start in range(0, len(rest), room):
            part = [*before, *rest[start : start + room]]
            if len(part) > 1:  # one token alone has none before it to be predicted from
                yield part, part
        return
    name = detect_format(row)
    if name is None and not isinstance(row, ValueError):
        problem = "this row is neither a conversation nor a text"
        raise UserError(location, problem, 'write a conversation as in data.source, or {"text": "..."}')
    try:
        conversation = to_conversation(row, location, name or "messages")
        check_order(conversation.messages)
        encoded = encoder.encode(conversation)
    except (RowError, RefusedError) as error:
        fix = getattr(error, "fix", "change the row, or use another data.template")
        raise UserError(location, error.problem, fix) from None
    if len(encoded.input_ids) > longest:
        problem = f"{len(encoded.input_ids):,} tokens are more than the {longest:,} of a row"
        raise UserError(location, problem, "shorten the conversation, or remove it: data.max_length is that of the run")
    yield encoded.input_ids, encoded.labels
