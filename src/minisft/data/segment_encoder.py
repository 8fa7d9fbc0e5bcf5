"""Segments of plain text to ids with the Rust tokenizer, and back."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from minisft.data.renderers.base import AFTER_CONTROL, CONTINUE, START

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


_AT_ONCE = 64  # texts per core in one call
_GUARDS = ("\n", "☺", ":", "a")
_PROBES = ("a", "Hello", " b", "1", ".")  # beginnings of texts, to see what a tokenizer does before them


class SegmentEncoder:
    """The Rust tokenizer on plain text: no special tokens, no truncation, no control token from content.

    Tokenizers of the SentencePiece family put a space before a text that starts. A segment in the middle of a text is
    therefore encoded after a guard, a short text whose tokens are then removed.

    Args:
        tokenizer: A fast tokenizer.
        markers: Tokens of the template that are ordinary text in content, although the tokenizer knows them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", markers: Iterable[str] = ()) -> None:
        # 1. Copies of the tokenizer. An answer may hold markers that are ordinary tokens.
        marked = set(markers)
        self.plain = self.answers = _plain_copy(tokenizer, marked)
        added = tokenizer.added_tokens_decoder.values()
        if any(not token.special and token.content in marked for token in added):
            self.answers = _plain_copy(tokenizer, set())
        # 2. Where the tokenizer adds a space to a text that starts: a guard that no text merges with.
        self.guards = {START: "", AFTER_CONTROL: "", CONTINUE: ""}
        self._guard_ids: list[int] = []
        adds_space = self.adds_space()
        for guard in _GUARDS if adds_space else ():
            ids = self.ids(guard)
            joined = [self.ids(guard + probe) for probe in _PROBES]
            if all(row[: len(ids)] == ids for row in joined) and self.plain.decode(ids).endswith(guard):
                self._guard_ids, self.guards[CONTINUE] = ids, self.plain.decode(ids)
                break
        # 3. Whether the tokenizer also adds that space after a control token.
        backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token
        if adds_space:
            self.guards[AFTER_CONTROL] = self.guards[CONTINUE]
        if adds_space and eos is not None:
            saved, backend.encode_special_tokens = backend.encode_special_tokens, False
            after_control = backend.encode(f"{eos}Hello", add_special_tokens=False).ids[1:]
            backend.encode_special_tokens = saved
            if after_control == self.ids("Hello"):
                self.guards[AFTER_CONTROL] = ""
        # 4. For decoding.
        self._table = _byte_table(tokenizer, self.plain)

    def adds_space(self) -> bool:
        """Return whether a text that starts gets a space that a text in the middle does not get."""
        return any(
            self.ids(f"\n{probe}")[len(self.ids("\n")) :] != self.ids(probe) for probe in ("a", "Hello", "1", ".")
        )

    def ids(self, text: str) -> list[int]:
        return list(self.plain.encode(text, add_special_tokens=False).ids)

    def encode(self, segments: Sequence[tuple[str, int, bool]]) -> list[list[int]]:
        """Return the ids of many segments, each (text, context, whether it is an answer), in one call."""
        if self.answers is self.plain:
            return self._encode(self.plain, segments)
        results: list[list[int]] = [[]] * len(segments)
        for backend, wanted in ((self.plain, False), (self.answers, True)):
            places = [i for i, segment in enumerate(segments) if segment[2] is wanted]
            for place, ids in zip(places, self._encode(backend, [segments[i] for i in places]), strict=True):
                results[place] = ids
        return results

    def decode(self, ids: Sequence[int], context: int) -> str:
        """Return the text of the ids of one segment; control tokens in it are spelled out."""
        return self.decode_many([ids], context)[0]

    def decode_many(self, rows: Sequence[Sequence[int]], context: int) -> list[str]:
        if self._table is not None:
            piece = self._table.__getitem__
            return [b"".join(map(piece, ids)).decode("utf-8", "replace") for ids in rows]
        guard = self.guards[context]
        if not guard:
            return self.plain.decode_batch(rows, skip_special_tokens=False)
        texts = self.plain.decode_batch([[*self._guard_ids, *ids] for ids in rows], skip_special_tokens=False)
        return [text[len(guard) :] for text in texts]

    def spellings(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token on its own; b"" for an id that is no token.

        Where the tokenizer spells no bytes, a token is decoded after the guard, which keeps the space that it writes.
        """
        if self._table is not None:
            return [self._table[id] if id < len(self._table) else b"" for id in ids]
        found = []
        for id, text in zip(ids, self.decode_many([[id] for id in ids], CONTINUE), strict=True):
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", self.plain.id_to_token(id) or "")
            found.append(bytes([int(byte[1], 16)]) if byte else text.encode("utf-8", "replace"))
        return found

    def _encode(self, backend: "Tokenizer", segments: Sequence[tuple[str, int, bool]]) -> list[list[int]]:
        if not self._guard_ids:
            return _encode_texts(backend, [segment[0] for segment in segments])
        guards = [self.guards[segment[1]] for segment in segments]
        results = _encode_texts(backend, [guard + segment[0] for guard, segment in zip(guards, segments, strict=True)])
        for i, guard in enumerate(guards):
            if guard:
                results[i] = self._without_guard(backend, results[i], segments[i][0])
        return results

    def _without_guard(self, backend: "Tokenizer", ids: list[int], text: str) -> list[int]:
        """Return the ids of a text that was encoded after the guard, without those of the guard."""
        size = len(self._guard_ids)
        if ids[:size] == self._guard_ids:
            return ids[size:]
        for guard in _GUARDS:  # the guard merged with the text: another guard may not
            guard_ids = self.ids(guard)
            ids = backend.encode(guard + text, add_special_tokens=False).ids
            if ids[: len(guard_ids)] == guard_ids:
                return ids[len(guard_ids) :]
        return backend.encode(text, add_special_tokens=False).ids


def _encode_texts(backend: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, encoded some at a time, so that the tokenizer's results fit the processor's cache."""
    size = _AT_ONCE * (1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else os.cpu_count() or 1)
    return [
        encoding.ids
        for start in range(0, len(texts), size)
        for encoding in backend.encode_batch_fast(texts[start : start + size], add_special_tokens=False)
    ]


def _plain_copy(tokenizer: "PreTrainedTokenizerFast", markers: set[str]) -> "Tokenizer":
    """Return a copy of the Rust tokenizer for which special tokens, and `markers`, are ordinary text."""
    from tokenizers import Tokenizer

    # 1. A copy that shares the vocabulary.
    backend = tokenizer.backend_tokenizer
    copy = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (component := getattr(backend, part)) is not None:
            setattr(copy, part, component)
    added = backend.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        add = copy.add_special_tokens if token.special or token.content in markers else copy.add_tokens
        add([token])
    # 2. Added tokens may get other ids in it: then a copy with a vocabulary of its own.
    ids = {id: token.content for id, token in copy.get_added_tokens_decoder().items()}
    if ids != {id: token.content for id, token in added.items()}:
        state = json.loads(backend.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["special"] or token["content"] in markers
        copy = Tokenizer.from_str(json.dumps(state))
    # 3. No limits, and no special tokens.
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _byte_table(tokenizer: "PreTrainedTokenizerFast", backend: "Tokenizer") -> list[bytes] | None:
    """Return the bytes of each token of a byte-level tokenizer, else None. Decoding joins these bytes.

    Such a tokenizer spells each byte as one letter (GPT-2's `bytes_to_unicode`).
    """
    from tokenizers import decoders

    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = dict.fromkeys(others, 0x100)  # letters that spell no byte, and that latin-1 cannot encode
    letters |= {byte: byte for byte in plain} | {256 + place: byte for place, byte in enumerate(others)}
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    try:
        for piece, id in vocabulary.items():
            table[id] = added[id].encode("utf-8") if id in added else piece.translate(letters).encode("latin-1")
    except UnicodeEncodeError:  # a piece that spells no bytes
        return None
    return table
