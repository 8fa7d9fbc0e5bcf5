"""The Rust tokenizer on segments of plain text, and back."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from minisft.data.renderers.base import AFTER_CONTROL, CONTINUE, START

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


_AT_ONCE = 64  # texts for one core
_GUARDS = ("\n", "☺", ":", "a")


class SegmentEncoder:
    """The Rust tokenizer on plain text: no special tokens, no truncation, no control token out of content.

    Tokenizers of the SentencePiece family put a space before a text that starts. Where a run stands in the middle
    of a text it is encoded behind a guard, whose tokens are then taken away.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", markers: Iterable[str] = ()) -> None:
        self.plain = _plain_copy(tokenizer, set(markers))
        self.answers = _plain_copy(tokenizer, set()) if _has_ordinary(tokenizer, markers) else self.plain
        self.guards = {START: "", AFTER_CONTROL: "", CONTINUE: ""}
        if self.adds_space():
            guard, self._guard_ids = self._find_guard()
            self.guards[CONTINUE] = guard
            if not self._adds_space_after_control(tokenizer):
                self.guards[AFTER_CONTROL] = guard
        else:
            self._guard_ids = []
        self._table = _byte_table(tokenizer, self.plain)

    def adds_space(self) -> bool:
        """Whether a text that starts gets a space that one in the middle does not get."""
        return any(
            self.ids(f"\n{probe}")[len(self.ids("\n")) :] != self.ids(probe) for probe in ("a", "Hello", "1", ".")
        )

    def ids(self, text: str) -> list[int]:
        return list(self.plain.encode(text, add_special_tokens=False).ids)

    def encode(self, segments: Sequence[tuple[str, int, bool]]) -> list[list[int]]:
        """Ids of many runs, each (text, context, whether it is an answer), in one call."""
        if self.answers is self.plain:
            return self._encode(self.plain, segments)
        results: list[list[int]] = [[]] * len(segments)
        for backend, wanted in ((self.plain, False), (self.answers, True)):
            places = [i for i, segment in enumerate(segments) if segment[2] is wanted]
            for place, ids in zip(places, self._encode(backend, [segments[i] for i in places]), strict=True):
                results[place] = ids
        return results

    def decode(self, ids: Sequence[int], context: int) -> str:
        """Text of the ids of one run (control tokens in it are spelled out)."""
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
        size = len(self._guard_ids)
        if ids[:size] == self._guard_ids:
            return ids[size:]
        for guard in _GUARDS:  # the guard grew into the text: another will not
            guard_ids = self.ids(guard)
            ids = backend.encode(guard + text, add_special_tokens=False).ids
            if ids[: len(guard_ids)] == guard_ids:
                return ids[len(guard_ids) :]
        return backend.encode(text, add_special_tokens=False).ids

    def _find_guard(self) -> tuple[str, list[int]]:
        for guard in _GUARDS:
            ids = self.ids(guard)
            joined = [self.ids(guard + probe) for probe in ("a", "Hello", " b", "1", ".")]
            if all(row[: len(ids)] == ids for row in joined) and self.plain.decode(ids).endswith(guard):
                return self.plain.decode(ids), ids
        return "", []

    def _adds_space_after_control(self, tokenizer: "PreTrainedTokenizerFast") -> bool:
        backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token
        if eos is None:
            return False
        saved, backend.encode_special_tokens = backend.encode_special_tokens, False
        ids = backend.encode(f"{eos}Hello", add_special_tokens=False).ids
        backend.encode_special_tokens = saved
        return ids[1:] == self.ids("Hello")


def _encode_texts(backend: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, some at a time: what the tokenizer makes beside the ids would else crowd the processor's cache."""
    size = _AT_ONCE * (1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else os.cpu_count() or 1)
    return [
        encoding.ids
        for start in range(0, len(texts), size)
        for encoding in backend.encode_batch_fast(texts[start : start + size], add_special_tokens=False)
    ]


def _plain_copy(tokenizer: "PreTrainedTokenizerFast", markers: set[str]) -> "Tokenizer":
    """A copy of the Rust tokenizer for which special tokens, and `markers`, are ordinary text."""
    copy = _sharing_copy(tokenizer, markers) or _whole_copy(tokenizer, markers)
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _sharing_copy(tokenizer: "PreTrainedTokenizerFast", markers: set[str]) -> "Tokenizer | None":
    """A copy that shares the vocabulary; None where the added tokens would get other ids in it."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    copy = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (found := getattr(backend, part)) is not None:
            setattr(copy, part, found)
    added = backend.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        add = copy.add_special_tokens if token.special or token.content in markers else copy.add_tokens
        add([token])
    ids = {id: token.content for id, token in copy.get_added_tokens_decoder().items()}
    return copy if ids == {id: token.content for id, token in added.items()} else None


def _whole_copy(tokenizer: "PreTrainedTokenizerFast", markers: set[str]) -> "Tokenizer":
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in markers
    return Tokenizer.from_str(json.dumps(state))


def _byte_table(tokenizer: "PreTrainedTokenizerFast", backend: "Tokenizer") -> list[bytes] | None:
    """The bytes of every token of a byte-level tokenizer, else None: decoding is then joining them."""
    from tokenizers import decoders

    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    letters = _byte_letters()
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    try:
        for piece, id in vocabulary.items():
            table[id] = added[id].encode("utf-8") if id in added else piece.translate(letters).encode("latin-1")
    except UnicodeEncodeError:  # a piece that spells no bytes
        return None
    return table


def _byte_letters() -> dict[int, int]:
    """Letters to bytes as byte-level tokenizers write them (GPT-2's `bytes_to_unicode`); those of none to no byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    no_byte = dict.fromkeys(others, 0x100)
    return no_byte | {byte: byte for byte in plain} | {256 + place: byte for place, byte in enumerate(others)}


def _has_ordinary(tokenizer: "PreTrainedTokenizerFast", markers: Iterable[str]) -> bool:
    marked = set(markers)
    added = tokenizer.added_tokens_decoder.values()
    return any(not token.special and token.content in marked for token in added)
