"""The training rows that share the most with a row: pieces of its prompt, its reference and the answer of the model.

A piece is a sequence of three tokens. Each counts by its rarity in the training rows (inverse document frequency), so
that what every row has, such as the markers of the template, counts next to nothing. Rows that share pieces need not be
the rows that taught the answer: similarity of gradients would say more, and is not computed.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.audit.findings import latest, losses_by_epoch
from minisft.audit.step_rows import ReportedToken, RowReport
from minisft.data.inspect import token_texts
from minisft.data.prepared import load_split, load_train
from minisft.errors import UserError
from minisft.files import read_json_lines
from minisft.models import load_tokenizer, resolve_model
from minisft.recipe import Recipe
from minisft.row_losses import read_row_losses
from minisft.run_folder import RunFolder, list_checkpoints
from minisft.training.batching import measure_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECE = 3  # tokens
NEAREST = 10  # rows
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MOST_NAMES = 10_000  # ids among which a similar one is looked for


@dataclass(frozen=True)
class SimilarRows:
    """The training rows nearest to a row.

    Args:
        id: Id of the row.
        split: "test" or "train": the split of the row.
        answered_by: Name of the evaluated checkpoint whose answer counts too; None: the row has no such answer.
        rows: The training rows, nearest first; `loss` is the last one of the run, and shared tokens are marked.
    """

    id: str
    split: str
    answered_by: str | None
    rows: tuple[RowReport, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": None,
            "replayed": False,
            "loss": None,
            "id": self.id,
            "split": self.split,
            "answered_by": self.answered_by,
            "rows": [row.as_dict() for row in self.rows],
        }


def find_similar_rows(recipe: Recipe, id: str) -> SimilarRows:
    """Find the training rows that share the most pieces with a row of the test split, or else of the train split.

    Raises:
        UserError: There is no such row, or no data.
    """
    run, train = RunFolder(Path(recipe.output)), load_train(recipe.output)
    split, own = _find(recipe.output, id)
    folder = resolve_model(recipe.model, recipe.trust_remote_code, weights=False).folder
    tokenizer = load_tokenizer(folder, recipe.trust_remote_code)
    name, answers = _answers_of_model(run, id) if split == "test" else (None, [])
    texts = [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64) for text in answers]
    query = np.unique(np.concatenate([pieces(ids) for ids in [*own, *texts]]))
    scores = similarities(train, query)
    if split == "train":
        scores[[number for number, other in enumerate(train["id"][:]) if other == id]] = -1.0
    sizes = measure_lengths(train)
    order = np.lexsort((sizes.tokens, -scores))[:NEAREST]
    losses = None
    if run.row_losses.exists():
        losses = latest(losses_by_epoch(read_row_losses(run.row_losses), len(train)))
    rows = []
    for number in order[scores[order] > 0].tolist():
        row = train[number]
        loss = None if losses is None or np.isnan(losses[number]) else float(losses[number])
        tokens = mark_shared(row["input_ids"], query, tokenizer)
        rows.append(
            RowReport(
                number, row["id"], row["location"], int(sizes.supervised[number]), loss, None, tokens,
                float(scores[number]),
            )
        )  # fmt: skip
    return SimilarRows(id, split, name, tuple(rows))


def _find(output: str, id: str) -> tuple[str, list[np.ndarray]]:
    """Return the split of an id, and the token ids of its rows."""
    known: list[str] = []
    for split in ("test", "train"):
        data = load_split(output, split)
        ids = data["id"][:]
        found = [np.asarray(data[number]["input_ids"]) for number, other in enumerate(ids) if other == id]
        if found:
            return split, found
        known += ids[:_MOST_NAMES]
    close = difflib.get_close_matches(id, known, n=1) or known[:1]
    raise UserError("--row", f"there is no row with the id {id!r}", f"give an id such as {', '.join(close)}")


def _answers_of_model(run: RunFolder, id: str) -> tuple[str | None, list[str]]:
    """Return the newest evaluated checkpoint, and its answers to a test row."""
    for checkpoint in reversed(list_checkpoints(run.root / "evaluation")):
        lines = read_json_lines(checkpoint / "outputs.jsonl", "evaluate again")
        outputs = [str(line["output"]) for line in lines if line.get("id") == id and "output" in line]
        if outputs:
            return checkpoint.name, outputs
    return None, []


def pieces(ids: np.ndarray) -> np.ndarray:
    """Return a hash of each sequence of `PIECE` tokens, uint64 (tokens - 2,); of shorter rows, one of all tokens."""
    padded = np.concatenate([ids, np.zeros(max(0, PIECE - len(ids)), dtype=np.int64)]).astype(np.uint64)
    found = padded[: len(padded) - PIECE + 1]
    for offset in range(1, PIECE):
        found = found * _MIX + padded[offset : len(padded) - PIECE + 1 + offset]
    return found


def similarities(data: Any, query: np.ndarray) -> np.ndarray:
    """Return for each row the share of the query's pieces that it has, weighted by rarity, (rows,) from 0 to 1."""
    pairs, first = [np.zeros((0, 2), dtype=np.int64)], 0
    for chunk in data.data.column("input_ids").chunks:
        if len(chunk) == 0:
            continue
        offsets, ids = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        hashes = pieces(ids)
        row = np.searchsorted(offsets, np.arange(len(hashes)), side="right") - 1
        inside = np.arange(len(hashes)) + PIECE <= offsets[row + 1]  # not into the next row
        kept = inside & np.isin(hashes, query, kind="sort")
        found = np.stack([row[kept] + first, np.searchsorted(query, hashes[kept])], axis=1)
        pairs.append(np.unique(found, axis=0))
        first += len(chunk)
    each = np.concatenate(pairs)
    rows_with = np.bincount(each[:, 1], minlength=len(query))
    weights = np.maximum(np.log((first + 1) / (rows_with + 0.5)), 0.0)
    shared = np.bincount(each[:, 0], weights=weights[each[:, 1]], minlength=first)
    return shared / max(float(weights.sum()), 1e-12)


def mark_shared(
    ids: Sequence[int], query: np.ndarray, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[ReportedToken, ...]:
    """Return the tokens of a row; those of pieces of the query are marked."""
    hits = np.isin(pieces(np.asarray(ids)), query, kind="sort")
    shared = np.zeros(max(len(ids), PIECE), dtype=bool)
    for offset in range(PIECE):
        shared[offset : offset + len(hits)] |= hits
    texts = token_texts(ids, tokenizer)
    return tuple(ReportedToken(text, None, bool(mark)) for text, mark in zip(texts, shared[: len(ids)], strict=True))
