"""Near-duplicate texts by MinHash and banding.

A text is the set of its shingles, which are the sequences of three words. The share of hash functions whose minimum is
the same for two texts estimates the Jaccard similarity of their sets (Broder 1997, "On the resemblance and containment
of documents"). Banding finds the pairs to compare (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
section 3.4).

All of it is numpy: the signatures of 100,000 texts take 50 MB, and no dictionary of Python objects is built.
"""

import re
import zlib
from array import array

import numpy as np

SIMILAR = 0.8  # Jaccard similarity from which a text is a near-duplicate, as in Lee et al. 2021 (arXiv 2107.06499)
_SHINGLE = 3  # words; chat turns are short, and with five words one changed word changes five shingles
# 21 bands of 6 hashes: banding finds 99.8 % of the pairs of similarity 0.8, and 93 % of those of 0.7.
_BANDS, _BAND_HASHES = 21, 6
_MOST_COMPARED = 8  # references of a bucket that a text is compared with
_MOST_WORDS = 500  # of a text: longer ones are compared by their beginning
_BLOCK = 1 << 18  # words whose signatures are computed together
_COMPARED = 1 << 14  # pairs that are compared together
# A word is a run of letters and digits; where a script writes no spaces (Han, kana), a character is a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_]+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


class NearDuplicateFinder:
    """Collects texts one after another, and counts those that nearly repeat an earlier one.

    Args:
        seed: Seed of the hash functions.
    """

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        hashes = _BANDS * _BAND_HASHES
        # h -> a h + b modulo 2^32 with an odd a is a permutation of the 32-bit hashes of shingles.
        self._factors = random.integers(0, 1 << 31, hashes, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self._offsets = random.integers(0, 1 << 32, hashes, dtype=np.uint32)
        self._words = array("I")
        self._counts: list[int] = []
        self._signatures: list[np.ndarray] = []

    def add(self, text: str) -> None:
        """Add a text."""
        words = WORD.findall(text.lower())[:_MOST_WORDS] or [text]
        crc32 = zlib.crc32
        self._words.extend([crc32(word.encode("utf-8", "surrogatepass")) for word in words])
        padding = max(0, _SHINGLE - len(words))
        self._words.extend([0] * padding)
        self._counts.append(len(words) + padding)
        if len(self._words) >= _BLOCK:
            self._sign_block()

    def near_duplicates(self) -> np.ndarray:
        """Return for each text, in order, whether it nearly repeats an earlier one; bool (texts,).

        A text is compared with the first and with the previous text of each of its buckets, so that a bucket of n texts
        costs 2 n comparisons.
        """
        self._sign_block()
        if not self._signatures:
            return np.zeros(0, dtype=bool)
        signatures = np.concatenate(self._signatures)
        self._signatures = [signatures]
        found = np.zeros(len(signatures), dtype=bool)
        for start in range(0, _BANDS * _BAND_HASHES, _BAND_HASHES):
            # 1. The buckets: texts with the same hashes in the band, in the order of the texts.
            keys = _band_keys(signatures, start)
            order = np.argsort(keys, kind="stable")
            repeats = np.append(False, keys[order][1:] == keys[order][:-1])
            places = np.arange(len(order))
            first = np.maximum.accumulate(np.where(repeats, 0, places))
            # 2. Compare.
            for other in (places - 1, first):
                for part in np.array_split(places[repeats], 1 + int(repeats.sum()) // _COMPARED):
                    left, right = order[part], order[other[part]]
                    unknown = ~found[left]
                    left, right = left[unknown], right[unknown]
                    same = (signatures[left] == signatures[right]).mean(axis=1)
                    found[left[same >= SIMILAR]] = True
        return found

    def nearest(self, references: int) -> tuple[np.ndarray, np.ndarray]:
        """Find for each text after the first ones the most similar of these.

        Args:
            references: The number of texts, added first, that the later ones are compared with.

        Returns:
            (later texts,) The number of the most similar reference, int64, -1 where none is a near-duplicate; and
            (later texts,) the estimated similarity, 0 there. A text is compared with the first _MOST_COMPARED
            references of each of its buckets.
        """
        self._sign_block()
        signatures = np.concatenate([np.zeros((0, _BANDS * _BAND_HASHES), np.uint32), *self._signatures])
        self._signatures = [signatures]
        found = np.full(len(signatures) - references, -1, dtype=np.int64)
        best = np.zeros(len(found))
        for start in range(0, _BANDS * _BAND_HASHES, _BAND_HASHES):
            keys = _band_keys(signatures, start)
            order = np.argsort(keys[:references], kind="stable")
            ordered, wanted = keys[order], keys[references:]
            first, end = (np.searchsorted(ordered, wanted, side) for side in ("left", "right"))
            for step in range(_MOST_COMPARED):
                left = np.flatnonzero(first + step < end)
                for part in np.array_split(left, 1 + len(left) // _COMPARED):
                    other = order[first[part] + step]
                    same = (signatures[references + part] == signatures[other]).mean(axis=1)
                    better = (same >= SIMILAR) & (same > best[part])
                    found[part[better]], best[part[better]] = other[better], same[better]
        return found, best

    def _sign_block(self) -> None:
        """Compute the signatures of the texts that were added since the last block; uint32 (texts, hashes)."""
        if not self._counts:
            return
        words, counts = np.frombuffer(self._words, np.uint32).astype(np.uint64), np.array(self._counts)
        # 1. Hashes of the shingles; those that would reach into the next text repeat the text's last one.
        mixed = (words[:-2] * _MIX + words[1:-1]) * _MIX + words[2:]
        mixed ^= mixed >> np.uint64(29)
        shingles = ((mixed * _MIX) >> np.uint64(32)).astype(np.uint32)
        ends = np.cumsum(counts)
        starts = ends - counts
        last = np.repeat(ends - _SHINGLE, counts)
        shingles = shingles[np.minimum(np.arange(len(words)), last)]
        # 2. The minimum of each hash function over each text.
        signatures = np.empty((len(counts), len(self._factors)), dtype=np.uint32)
        hashed = np.empty_like(shingles)
        for number, (factor, offset) in enumerate(zip(self._factors, self._offsets, strict=True)):
            np.multiply(shingles, factor, out=hashed)
            hashed += offset
            signatures[:, number] = np.minimum.reduceat(hashed, starts)
        self._signatures.append(signatures)
        self._words, self._counts = array("I"), []


def _band_keys(signatures: np.ndarray, start: int) -> np.ndarray:
    """Return the buckets of all texts in the band that begins with the hash `start`; uint64 (texts,)."""
    keys = np.zeros(len(signatures), dtype=np.uint64)
    for column in range(start, start + _BAND_HASHES):
        keys = (keys ^ signatures[:, column]) * _MIX
    return keys
