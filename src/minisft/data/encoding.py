"""Runs to input ids and labels: the `Encoder` that training, evaluation and chat share.

Every run is encoded on its own by the Rust tokenizer, all runs of a batch of conversations in one call; control
tokens are placed by id. Labels are the ids where a run is supervised and -100 elsewhere, unshifted.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from minisft.data.conversation import ROLES, Conversation, Message
from minisft.data.rendering import (
    AFTER_CONTROL,
    CONTINUE,
    START,
    Answer,
    Control,
    MarkerSplitter,
    MistralRenderer,
    Rendered,
    Renderer,
    Run,
    TurnRenderer,
)
from minisft.data.templates import (
    EOS,
    NATIVE_TEMPLATES,
    TURN_TEMPLATES,
    MistralTemplate,
    TurnTemplate,
    mistral_jinja,
    turn_jinja,
)
from minisft.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # the label of a token that is not learned
_SHORT, _SHORT_TEXTS = 16, 65536  # texts of so many characters are remembered, so many of them
_GUARDS = ("\n", "☺", ":", "a")


@dataclass(frozen=True)
class AnswerSpan:
    """Where an answer's tokens lie in a row: ids[start:end], the terminator included."""

    message: int
    start: int
    end: int
    text: str
    supervised: bool
    terminated: bool = True
    cut: bool = False  # its end is missing: the row was too long


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    Args:
        input_ids: the whole rendering.
        labels: the same ids where they are learned, -100 elsewhere; unshifted.
        answers: the answers in order.
        findings: what the template or the tokenizer did that the ledger counts.
    """

    input_ids: list[int]
    labels: list[int]
    answers: tuple[AnswerSpan, ...] = ()
    findings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise ValueError("input_ids and labels differ in length")


class RunEncoder:
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

    def encode(self, runs: Sequence[tuple[str, int, bool]]) -> list[list[int]]:
        """Ids of many runs, each (text, context, whether it is an answer), in one call."""
        if self.answers is self.plain:
            return self._encode(self.plain, runs)
        results: list[list[int]] = [[]] * len(runs)
        for backend, wanted in ((self.plain, False), (self.answers, True)):
            places = [i for i, run in enumerate(runs) if run[2] is wanted]
            for place, ids in zip(places, self._encode(backend, [runs[i] for i in places]), strict=True):
                results[place] = ids
        return results

    def decode(self, ids: Sequence[int], context: int) -> str:
        """Text of the ids of one run (control tokens in it are spelled out)."""
        return self.decode_many([ids], context)[0]

    def decode_many(self, rows: Sequence[Sequence[int]], context: int) -> list[str]:
        if self._table is not None:
            table = self._table
            return [b"".join([table[id] for id in ids]).decode("utf-8", "replace") for ids in rows]
        guard = self.guards[context]
        if not guard:
            return self.plain.decode_batch(rows, skip_special_tokens=False)
        texts = self.plain.decode_batch([[*self._guard_ids, *ids] for ids in rows], skip_special_tokens=False)
        return [text[len(guard) :] for text in texts]

    def _encode(self, backend: "Tokenizer", runs: Sequence[tuple[str, int, bool]]) -> list[list[int]]:
        if not self._guard_ids:
            batch = backend.encode_batch_fast([run[0] for run in runs], add_special_tokens=False)
            return [encoding.ids for encoding in batch]
        guards = [self.guards[run[1]] for run in runs]
        texts = [guard + run[0] for guard, run in zip(guards, runs, strict=True)]
        batch = backend.encode_batch_fast(texts, add_special_tokens=False)
        results = [encoding.ids for encoding in batch]
        for i, guard in enumerate(guards):
            if guard:
                results[i] = self._without_guard(backend, results[i], runs[i][0])
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


def _plain_copy(tokenizer: "PreTrainedTokenizerFast", markers: set[str]) -> "Tokenizer":
    """A copy of the Rust tokenizer for which special tokens, and `markers`, are ordinary text."""
    from tokenizers import Tokenizer

    text = tokenizer.backend_tokenizer.to_str()
    if markers:
        state = json.loads(text)
        for token in state["added_tokens"]:
            token["special"] = token["special"] or token["content"] in markers
        text = json.dumps(state)
    copy = Tokenizer.from_str(text)
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _byte_table(tokenizer: "PreTrainedTokenizerFast", backend: "Tokenizer") -> list[bytes] | None:
    """The bytes of every token of a byte-level tokenizer, else None: decoding is then joining them."""
    from tokenizers import decoders

    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    letters = _byte_letters()
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    for piece, id in vocabulary.items():
        if id in added:
            table[id] = added[id].encode("utf-8")
        elif all(letter in letters for letter in piece):
            table[id] = bytes([letters[letter] for letter in piece])
        else:
            return None
    return table


def _byte_letters() -> dict[str, int]:
    """The letter by which byte-level tokenizers write each byte (GPT-2's `bytes_to_unicode`), the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in plain)
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


def _has_ordinary(tokenizer: "PreTrainedTokenizerFast", markers: Iterable[str]) -> bool:
    marked = set(markers)
    added = tokenizer.added_tokens_decoder.values()
    return any(not token.special and token.content in marked for token in added)


@dataclass
class EncodedBatch:
    """Conversations as flat arrays.

    Args:
        ids: int32, the rows one after the other.
        labels: int32, likewise; -100 where not learned.
        offsets: int64, rows + 1; row i is ids[offsets[i]:offsets[i + 1]].
        answers: each row's answers.
        findings: each row's findings.
    """

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    answers: list[tuple[AnswerSpan, ...]] = field(default_factory=list)
    findings: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Encoded:
        span = slice(self.offsets[row], self.offsets[row + 1])
        return Encoded(self.ids[span].tolist(), self.labels[span].tolist(), self.answers[row], self.findings[row])


class Encoder:
    """Conversations to ids and back, in one template on one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        template: as in the recipe: a native template's name, "auto" (the tokenizer's own), the path of a Jinja
            file, or a Jinja text.

    Attributes:
        template_name: the template in use; for `mistral` the form that was chosen.
        chat_template: the Jinja text to save with the model.
        stop_token_ids: the trained terminators, at which generation stops; the first is the main one.

    Raises:
        UserError: the template does not exist or the tokenizer cannot carry it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", template: str = "auto") -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError("model", "its tokenizer has no fast (Rust) form", "use a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self._added = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items()}
        self._probe = RunEncoder(tokenizer)
        choice = self._choose(template)
        self.template_name = choice.name
        self.chat_template = choice.chat_template
        self._render: Renderer = choice.renderer
        self.stop_token_ids = choice.stop_token_ids
        special = {name for name, (_, token) in self._added.items() if token.special}
        ordinary = [m for m in choice.markers if m in self._added and not self._added[m][1].special]
        self._runs = RunEncoder(tokenizer, ordinary) if ordinary else self._probe
        # An answer may hold the ordinary tokens that its template writes, such as <think>: nobody typed them.
        self._answer_spells = _spelling_pattern(special | set(choice.plain_markers))
        self._spells = _spelling_pattern(special | set(choice.plain_markers) | set(choice.markers))
        self._answer_context = choice.answer_context
        self._joint = choice.joint
        self._boundary: dict[tuple[str, str], bool] = {}
        self._short: dict[tuple[str, int, bool], list[int]] = {}

    # --- what others call ---------------------------------------------------------------------------------

    def encode(self, conversation: Conversation, train_on: str = "assistant") -> Encoded:
        """Ids and labels of one conversation; see `encode_batch`."""
        return self.encode_batch([conversation], train_on)[0]

    def encode_batch(self, conversations: Sequence[Conversation], train_on: str = "assistant") -> EncodedBatch:
        """Ids and labels of many conversations, with one call of the tokenizer.

        Raises:
            RefusedError: the template cannot render a conversation faithfully.
        """
        rendered = [self.render(conversation, train_on) for conversation in conversations]
        return self.encode_rendered(rendered, conversations)

    def render(self, conversation: Conversation, train_on: str = "assistant") -> Rendered:
        """The runs of one conversation.

        Raises:
            RefusedError: the template cannot render it faithfully.
        """
        conversation = conversation.supervise(train_on)
        return self._render(conversation.messages, tool_lines(conversation.tools), False)

    def encode_rendered(self, rendered: Sequence[Rendered], conversations: Sequence[Conversation]) -> EncodedBatch:
        """Ids and labels of conversations that were rendered before."""
        ids, lengths, flags, counts = self._encode_runs([row.runs for row in rendered])
        labels = np.where(np.repeat(flags, lengths), ids, IGNORED).astype(np.int32)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        run_offsets = np.concatenate([[0], np.cumsum(counts)])
        batch = EncodedBatch(ids, labels, ends[run_offsets])
        for row, start in zip(rendered, run_offsets[:-1].tolist(), strict=True):
            places = (ends[start : start + len(row.runs) + 1] - ends[start]).tolist()
            batch.answers.append(tuple(_span(answer, places, row.runs) for answer in row.answers))
        self._add_findings(batch, rendered, conversations)
        return batch

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """The ids that are sent at inference for the answer that follows `messages`: a prefix of its training row.

        Raises:
            RefusedError: the template cannot render the messages faithfully.
        """
        rendered = self._render(tuple(messages), tool_lines(tools), True)
        ids, _, _, _ = self._encode_runs([rendered.runs])
        return ids.tolist()

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of generated ids, with or without their terminator."""
        stops = set(self.stop_token_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        special = {id for id, token in self._added.values() if token.special}
        return self._runs.decode([token for token in ids[:end] if token not in special], self._answer_context)

    def decode_answers(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of many answers' ids, their terminators left out by the caller."""
        return self._runs.decode_many(rows, self._answer_context)

    def round_trip(self, text: str) -> str:
        """What the tokenizer makes of an answer's text: not the text itself where its normaliser loses something."""
        ids = self._runs.encode([(text, self._answer_context, True)])[0]
        return self._runs.decode(ids, self._answer_context)

    # --- encoding -----------------------------------------------------------------------------------------

    def _encode_runs(self, rows: Sequence[Sequence[Run]]) -> tuple[np.ndarray, ...]:
        """All runs in one call: flat ids, tokens per run, supervised per run, runs per row."""
        runs = list(chain.from_iterable(rows))
        parts: list[Sequence[int] | None] = [self._known_ids(run) for run in runs]
        unknown = [i for i, part in enumerate(parts) if part is None]
        encoded = self._runs.encode([(runs[i].text, runs[i].context, runs[i].answer) for i in unknown])
        for i, found in zip(unknown, encoded, strict=True):
            parts[i] = found
            self._remember(runs[i], found)
        known = cast("list[Sequence[int]]", parts)
        lengths = np.fromiter(map(len, known), np.int64, len(known))
        ids = np.fromiter(chain.from_iterable(known), np.int32, int(lengths.sum()))
        flags = np.fromiter((run.supervised for run in runs), bool, len(runs))
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return ids, lengths, flags, counts

    def _known_ids(self, run: Run) -> Sequence[int] | None:
        """Ids of a control token, or of a short text that came before: templates write the same few ever again."""
        if run.control >= 0:
            return (run.control,)
        return self._short.get((run.text, run.context, run.answer)) if len(run.text) <= _SHORT else None

    def _remember(self, run: Run, ids: list[int]) -> None:
        if len(run.text) <= _SHORT and len(self._short) < _SHORT_TEXTS:
            self._short[run.text, run.context, run.answer] = ids

    def _add_findings(
        self, batch: EncodedBatch, rendered: Sequence[Rendered], conversations: Sequence[Conversation]
    ) -> None:
        for row, conversation in zip(rendered, conversations, strict=True):
            found = dict.fromkeys(row.findings)
            if any((self._answer_spells if m.is_answer else self._spells)(m.text) for m in conversation.messages):
                found["spells_control"] = None
            if self._joint and self._boundary_differs(row):
                found["boundary"] = None
            batch.findings.append(tuple(found))

    def _boundary_differs(self, row: Rendered) -> bool:
        """Whether encoding a prompt and its answer in one piece would give other ids than encoding them apart."""
        for answer in row.answers:
            if answer.start == 0 or answer.start >= len(row.runs):
                continue
            before, after = row.runs[answer.start - 1], row.runs[answer.start]
            if before.control >= 0 or after.control >= 0:
                continue
            if self._merges(before.text[-16:], after.text[:32]):
                return True
        return False

    def _merges(self, tail: str, head: str) -> bool:
        key = (tail, head if not head[:1].isalnum() else head[:1])
        known = self._boundary.get(key)
        if known is None:
            joint = self._runs.ids(tail + key[1])
            apart = self._runs.encode([(tail, START, False), (key[1], CONTINUE, False)])
            known = joint != apart[0] + apart[1]
            if len(self._boundary) < 65536:
                self._boundary[key] = known
        return known

    # --- choosing the template ----------------------------------------------------------------------------

    def _choose(self, template: str) -> "_Choice":
        if template == "auto":
            return self._choose_own()
        if template in NATIVE_TEMPLATES:
            return self._native(template)
        if _is_jinja(template):
            return self._jinja_or_native(template, "jinja")
        path = template_file(template)
        if path is None:
            known = ", ".join((*NATIVE_TEMPLATES, "auto"))
            raise UserError(
                "data.template", f"there is no template {template!r}", f"use one of {known} or a .jinja file's path"
            )
        return self._jinja_or_native(_read_template(path), path.name)

    def _choose_own(self) -> "_Choice":
        own = own_template(self.tokenizer)
        if not own:
            raise UserError(
                "data.template",
                "the model's tokenizer has no chat template of its own",
                f"name one in the recipe, data.template: {' or '.join(NATIVE_TEMPLATES)}, or a .jinja file",
            )
        return self._jinja_or_native(own, "auto")

    def _jinja_or_native(self, text: str, name: str) -> "_Choice":
        """Our own renderer where the text is the twin of one of ours, so that it goes on as it was trained."""
        match = re.match(r"\{# minisft: ([\w-]+) #\}", text)
        if match:
            named = {"mistral-text": "mistral"}.get(match[1], match[1])
            if named in NATIVE_TEMPLATES:
                choice = self._native(named)
                if choice.chat_template == text:
                    return choice
        return self._jinja(text, name)

    def _native(self, name: str) -> "_Choice":
        if name in TURN_TEMPLATES:
            return self._turns(TURN_TEMPLATES[name])
        return self._mistral(name)

    def _turns(self, template: TurnTemplate) -> "_Choice":
        if template.end == EOS:
            self._require_eos(template.name)
            template = replace(template, end=str(self.tokenizer.eos_token))
        headers = "".join(map(template.open_turn, ROLES))
        written = [template.begin, template.end, *re.findall(r"<\|\w+\|>", headers)]
        controls = {name: self._control(name) for name in written if self._is_special(name)}
        stop = controls[template.end].id if template.end in controls else self._require_eos(template.name)
        if template.begin not in controls:
            template = replace(template, begin="")
        plain = [name for name in written if name and name not in controls]
        answer_end = template.end if template.end in controls else str(self.tokenizer.eos_token)
        return _Choice(
            template.name,
            turn_jinja(template, answer_end),
            TurnRenderer(template, MarkerSplitter(controls), stop),
            (stop,),
            markers=list(controls),
            plain_markers=plain,
            answer_context=CONTINUE,
            joint=True,
        )

    def _mistral(self, name: str) -> "_Choice":
        has_controls = self._is_special("[INST]") and self._is_special("[/INST]")
        if name == "mistral-v3" and not has_controls:
            raise UserError(
                "data.template",
                "mistral-v3 needs a tokenizer with the control tokens [INST] and [/INST], and this one has none",
                "use data.template: mistral, which writes the same form as plain text",
            )
        if name == "mistral-v1" and has_controls:
            raise UserError(
                "data.template",
                "mistral-v1 writes [INST] as text, and for this tokenizer it is a control token",
                "use data.template: mistral, which is mistral-v3 here",
            )
        controls = has_controls
        eos = self._require_eos(name)
        bos = self.tokenizer.bos_token if controls or self._adds_bos() else None
        gap, gap_after_control = self._gaps()
        form = "mistral-v3" if controls else ("mistral-v1" if name == "mistral-v1" or bos else "mistral-text")
        written = MistralTemplate(form, controls, bos or "", str(self.tokenizer.eos_token), gap, gap_after_control)
        renderer = MistralRenderer(
            written,
            self._id(bos) if bos else None,
            eos,
            self._id("[INST]") if controls else None,
            self._id("[/INST]") if controls else None,
        )
        return _Choice(
            form,
            mistral_jinja(written),
            renderer,
            (eos,),
            markers=["[INST]", "[/INST]"] if controls else [],
            plain_markers=[] if controls else ["[INST]", "[/INST]"],
            answer_context=START,
        )

    def _jinja(self, text: str, name: str) -> "_Choice":
        from minisft.data.jinja import JinjaRenderer

        spelled = [name for name in self._added if name.strip() and (self._is_special(name) or name in text)]
        renderer = JinjaRenderer(
            self.tokenizer,
            text,
            MarkerSplitter({name: self._control(name) for name in spelled}),
            frozenset(filter(self._is_special, spelled)),
        )
        return _Choice(name, text, renderer, (renderer.stop,), markers=spelled, answer_context=CONTINUE, joint=True)

    # --- what the tokenizer has ---------------------------------------------------------------------------

    def _is_special(self, name: str) -> bool:
        return name in self._added and self._added[name][1].special

    def _id(self, name: str) -> int:
        return (
            self._added[name][0]
            if name in self._added
            else int(cast("int", self.tokenizer.convert_tokens_to_ids(name)))
        )

    def _control(self, name: str) -> Control:
        id, token = self._added[name]
        return Control(id, token.lstrip, token.rstrip)

    def _require_eos(self, template: str) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "model", f"its tokenizer has no EOS token, with which {template} ends an answer", "set eos_token"
            )
        return int(self.tokenizer.eos_token_id)

    def _adds_bos(self) -> bool:
        """Whether the tokenizer itself puts a BOS before a text: its post-processor says so."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos]

    def _gaps(self) -> tuple[str, str]:
        """The spaces a joint encoding needs to come out as encoding apart: in a text, and after a control token."""
        if not self._probe.adds_space():
            return "", ""
        after = " " if self._probe.guards[AFTER_CONTROL] else ""
        return " ", after


@dataclass(frozen=True)
class _Choice:
    """A template as it stands on one tokenizer."""

    name: str
    chat_template: str
    renderer: Renderer
    stop_token_ids: tuple[int, ...]
    markers: list[str] = field(default_factory=list)
    plain_markers: list[str] = field(default_factory=list)
    answer_context: int = START
    joint: bool = False


def tool_lines(tools: str) -> list[str]:
    """The functions on offer as one JSON text each."""
    if not tools:
        return []
    parsed: Any = json.loads(tools)
    listed = parsed if isinstance(parsed, list) else [parsed]
    return [json.dumps(tool, ensure_ascii=False) for tool in listed]


def _span(answer: Answer, places: Sequence[int], runs: Sequence[Run]) -> AnswerSpan:
    supervised = runs[answer.start].supervised if answer.start < len(runs) else False
    return AnswerSpan(
        answer.message, places[answer.start], places[answer.end], answer.text, supervised, answer.terminated
    )


def _spelling_pattern(markers: Iterable[str]) -> Any:
    """A function that says whether a text spells one of the markers."""
    names = sorted({name for name in markers if name.strip()}, key=len, reverse=True)
    if not names:
        return lambda text: False
    starts = "".join(sorted({name[0] for name in names}))
    pattern = re.compile(f"(?=[{re.escape(starts)}])(?:{'|'.join(map(re.escape, names))})")
    return pattern.search


def own_template(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """The tokenizer's own chat template, of several the default one."""
    own: Any = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def template_file(template: str) -> Path | None:
    """The file that `data.template` names; None where it is a template's name or a Jinja text, or there is no file."""
    if template in ("auto", *NATIVE_TEMPLATES) or _is_jinja(template):
        return None
    try:
        path = Path(template).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # a name too long, or the home of nobody
        return None


def _is_jinja(template: str) -> bool:
    return "{{" in template or "{%" in template


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"the template cannot be read ({error})", "give a readable UTF-8 file") from None
