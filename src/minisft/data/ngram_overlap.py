"""Texts that share a long sequence of words with others, as contamination of benchmarks is measured.

As in the GPT-3 paper (Brown et al. 2020, arXiv 2005.14165, appendix C): words in lower case without punctuation, and an
item is contaminated if one of its 13-grams is in a training text. Of a shorter item, its longest passage counts, and
items below 8 words are not judged. As in the Llama 2 paper (Touvron et al. 2023, arXiv 2307.09288, section A.6), the
share of an item's words inside such n-grams is given too.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minisft.data.near_duplicates import WORD

NGRAM, SHORTEST = 13, 8  # words
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """What an item shares with the texts.

    Args:
        words: Number of words of the item's longest passage.
        text: Number of the first text that shares an n-gram with it; None: no text does.
        share: The share of the item's words that are inside shared n-grams, 0 to 1.
        passage: The first shared n-gram, as words.
    """

    words: int
    text: int | None = None
    share: float = 0.0
    passage: str = ""

    @property
    def is_too_short(self) -> bool:
        return self.words < SHORTEST


def find_overlaps(items: Sequence[Sequence[str]], texts: Iterable[str], most_texts: int | None = None) -> list[Overlap]:
    """Return what each item shares with the texts, which are read once.

    Args:
        items: Each item as a list of passages; an n-gram does not reach from one passage into the next.
        texts: The texts to look in, such as the train rows.
        most_texts: An n-gram in more texts is a common phrase, and does not count; None: every n-gram counts.
    """
    # 1. The n-grams of the items, by their length: 13 words, or the longest passage of a shorter item.
    passages = [[WORD.findall(passage.lower()) for passage in item] for item in items]
    longest = [max(map(len, item), default=0) for item in passages]
    lengths = [max(SHORTEST, min(NGRAM, words)) for words in longest]
    wanted: dict[int, list[np.ndarray]] = {}
    for item, length in zip(passages, lengths, strict=True):
        wanted.setdefault(length, []).extend(_ngram_hashes(words, length) for words in item)
    tables = {length: np.unique(np.concatenate(hashes)) for length, hashes in wanted.items() if hashes}
    tables = {length: table for length, table in tables.items() if len(table)}
    first_text = {length: np.full(len(table), -1, dtype=np.int64) for length, table in tables.items()}
    counts = {length: np.zeros(len(table), dtype=np.int64) for length, table in tables.items()}

    # 2. Look for them in the texts.
    for number, text in enumerate(texts):
        words = WORD.findall(text.lower())
        for length, table in tables.items():
            hashes = _ngram_hashes(words, length)
            places = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            hits = np.unique(places[table[places] == hashes])
            counts[length][hits] += 1
            first_text[length][hits[first_text[length][hits] < 0]] = number
    if most_texts is not None:
        for length, number_of_texts in counts.items():
            first_text[length][number_of_texts > most_texts] = -1

    # 3. What each item shares.
    overlaps = []
    for item, length, most in zip(passages, lengths, longest, strict=True):
        shared, texts_found, passage = 0, [], ""
        for words in (words for words in item if len(words) >= length):
            found = first_text[length][np.searchsorted(tables[length], _ngram_hashes(words, length))]
            starts = np.flatnonzero(found >= 0)
            covered = np.zeros(len(words), dtype=bool)
            for start in starts:
                covered[start : start + length] = True
            shared += int(covered.sum())
            texts_found += found[starts].tolist()
            passage = passage or (" ".join(words[starts[0] : starts[0] + length]) if len(starts) else "")
        total = sum(map(len, item))
        overlaps.append(Overlap(most, min(texts_found, default=None), shared / total if total else 0.0, passage))
    return overlaps


def _ngram_hashes(words: Sequence[str], length: int) -> np.ndarray:
    """Return a hash of each n-gram of the words; uint64 (n-grams,)."""
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    count = len(words) - length + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        mixed = (mixed + hashes[offset : offset + count] + np.uint64(1)) * _MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    return mixed
