"""How much of the test answers stands in the train answers, word for word."""

from collections.abc import Iterable
from typing import Any

import numpy as np

NGRAM = 13  # tokens, as in the contamination report of the GPT-3 paper (appendix C)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_TO_2ND, _TO_4TH = (np.uint64(pow(int(_MULTIPLIER), power, 1 << 64)) for power in (2, 4))
_MOST = 200_000  # n-grams of test rows looked for; of more, a share chosen by their hashes
_TABLE_BITS = 22  # of a table by the hashes' last bits: a glance at it tells most n-grams that are not wanted

Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, labels, offsets of some rows


def overlap_report(train: Iterable[Part], test: Iterable[Part], test_tokens: int) -> dict[str, Any]:
    """How many of the answers' n-grams of the test rows are also in an answer of a train row.

    Args:
        train: the train rows in parts.
        test: the test rows in parts.
        test_tokens: how many tokens the test rows have, for the choice of a sample.
    """
    every = np.uint64(max(1, test_tokens // _MOST))
    hashes, rows = _test_ngrams(test, every)
    wanted = np.unique(hashes)
    found = _found(train, wanted, every) if len(wanted) else np.zeros(0, dtype=bool)
    hit = found[np.searchsorted(wanted, hashes)]
    per_row = np.bincount(rows, minlength=1)
    hits_per_row = np.bincount(rows, weights=hit, minlength=len(per_row))
    return {
        "ngram": NGRAM,
        "sampled": f"1/{every}",
        "test_ngrams": len(hashes),
        "also_in_train": int(hit.sum()),
        "test_rows_half_in_train": int(((hits_per_row * 2 >= per_row) & (per_row > 0)).sum()),
    }


def _found(train: Iterable[Part], wanted: np.ndarray, every: np.uint64) -> np.ndarray:
    """Which of the wanted n-grams (sorted hashes) stand in an answer of the train rows."""
    mask = np.uint64((1 << _TABLE_BITS) - 1)
    table = np.zeros(1 << _TABLE_BITS, dtype=bool)
    table[wanted & mask] = True
    found = np.zeros(len(wanted), dtype=bool)
    for ids, labels, _ in train:
        there = _sample(_ngrams(ids, labels)[0], every)
        there = there[table[there & mask]]
        places = np.minimum(np.searchsorted(wanted, there), len(wanted) - 1)
        found[places[wanted[places] == there]] = True
    return found


def _test_ngrams(parts: Iterable[Part], every: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    hashes, rows, base = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for ids, labels, offsets in parts:
        made, starts = _ngrams(ids, labels)
        kept = made % every == 0
        hashes.append(made[kept])
        rows.append(np.searchsorted(offsets, starts[kept], side="right") - 1 + base)
        base += len(offsets) - 1
    return np.concatenate(hashes), np.concatenate(rows)


def _sample(hashes: np.ndarray, every: np.uint64) -> np.ndarray:
    return hashes if every == 1 else hashes[hashes % every == 0]


def _ngrams(ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and places of the n-grams that lie wholly in one answer (between two answers stands a prompt)."""
    count = len(ids) - NGRAM + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    supervised = np.concatenate([[0], np.cumsum(labels >= 0)])
    starts = np.flatnonzero(supervised[NGRAM:] - supervised[:-NGRAM] == NGRAM)
    hashes = _polynomial(ids.astype(np.uint64) + np.uint64(1))
    hashes = hashes[starts]
    hashes ^= hashes >> np.uint64(29)  # the low bits alone depend on the last tokens alone
    return hashes * _MULTIPLIER ^ (hashes >> np.uint64(32)), starts


def _polynomial(tokens: np.ndarray) -> np.ndarray:
    """The polynomial of every 13 tokens in a row, of those of 1, 2, 4 and 8 tokens: five passes instead of twelve."""
    assert NGRAM == 8 + 4 + 1
    two = tokens[:-1] * _MULTIPLIER + tokens[1:]
    four = two[:-2] * _TO_2ND + two[2:]
    eight = four[:-4] * _TO_4TH + four[4:]
    twelve = eight[:-4] * _TO_4TH + four[8:]
    return twelve[:-1] * _MULTIPLIER + tokens[12:]
