"""The seeded split: by first prompt, so that no question is in both splits, whatever the order of the rows."""

import hashlib
from collections.abc import Sequence

import numpy as np

from minisft.data.conversation import Conversation


def prompt_key(conversation: Conversation, seed: int) -> int:
    """Return a seeded 64-bit hash of the first user turn, ignoring space and case."""
    first = next((m.content for m in conversation.messages if m.role == "user"), "")
    plain = " ".join(first.lower().split())
    digest = hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8, key=str(seed).encode()[:64])
    return int.from_bytes(digest.digest(), "little")


def identity_key(conversation: Conversation) -> int:
    """Return a 64-bit hash of the complete conversation, by which duplicates are counted."""
    text = "\0".join([f"{message.role}\0{message.text}" for message in conversation.messages])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def choose_test(keys: Sequence[int] | np.ndarray, fraction: float) -> np.ndarray:
    """Choose the test rows: complete groups of equal keys in the keys' order, up to `fraction` of the rows.

    At least one group is chosen where there are two and the fraction is above 0; at least one is left to train on.

    Args:
        keys: The split key of each row, uint64.
        fraction: The share of test rows, from 0 to 1.

    Returns:
        A bool for each row: whether it is a test row.
    """
    rows = np.asarray(keys, dtype=np.uint64)
    groups, member, sizes = np.unique(rows, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(groups), dtype=bool)
    left = round(fraction * len(rows))
    if fraction > 0 and len(groups) > 1:
        left = max(left, 1)
        for group, size in enumerate(sizes.tolist()):
            if size <= left:
                chosen[group] = True
                left -= size
            if left == 0:
                break
        if not chosen.any():
            chosen[int(np.argmin(sizes))] = True
        if chosen.all():
            chosen[int(np.argmax(sizes))] = False
    return chosen[member]
