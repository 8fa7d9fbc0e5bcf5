"""A fast tokenizer as the vocabulary of a GGUF file, in the two forms that llama.cpp implements.

Byte-level BPE ("gpt2") splits texts by a pre-tokenizer that the file names; SentencePiece's BPE ("llama") has scores,
and writes a space as U+2581. Which one, and which pre-tokenizer, is decided by the structure of `tokenizer.json`; what
llama.cpp would encode in another way is refused.

Keys and token types: the GGUF specification (ggml/docs/gguf.md, "Tokenizer"); pre-tokenizers: llama.cpp's
`llama-vocab.cpp`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"  # values of tokenizer.ggml.model
# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_FIX = "export a plain folder, and convert it with another tool whose result you compare with this model's own ids"
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0  # what SentencePiece's converters write; no merge has such a score

# The regular expressions of known pre-tokenizers, as tokenizer.json spells them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_LLAMA3 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}{_SYMBOLS}{_LINES}"
_QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{_SYMBOLS}{_LINES}"
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_LINES}"
_TEKKEN = rf"{_CASES[0]}|{_CASES[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_LINES}"
_GPT4O = rf"{_CASES[0]}{_ENDINGS}?|{_CASES[1]}{_ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_LINES}"
_DIGITS = "one digit at a time"
_GPT2 = "the words of GPT-2"
# llama.cpp's name by the steps of the pre-tokenizer, and by whether a word that is a token is taken without merges.
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer.

    Args:
        model: BYTE_LEVEL or SENTENCE_PIECE.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: Text of each id.
        types: Kind of each id, such as CONTROL.
        scores: Score of each id, for SENTENCE_PIECE; the adjacent pair whose token has the highest is joined first.
        merges: "left right" in order, for BYTE_LEVEL.
        space_prefix: Whether a text at the start and after a control token gets a space, for SENTENCE_PIECE.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space_prefix: bool


def read_vocabulary(tokenizer: "PreTrainedTokenizerFast", rows: int, begins_with_control: bool = False) -> Vocabulary:
    """Translate a fast tokenizer.

    Args:
        tokenizer: The tokenizer.
        rows: Number of rows of the embedding; ids without a token become unused ones.
        begins_with_control: Whether prompts begin with a control token after BOS.

    Raises:
        UserError: llama.cpp has no such tokenizer, or it has more tokens than the embedding has rows.
    """
    # 1. The kind of tokenizer.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        _refuse(f"its tokenizer is a {model['type']} model, and only BPE is written to GGUF")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            _refuse(f"its tokenizer has {key} = {model[key]!r}, which llama.cpp does not know")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(state["pre_tokenizer"], "pretokenizers"))
    # 2. The tokens.
    tokens, types = _tokens_of(tokenizer, model, rows)
    if byte_level:
        pre = _name_pre_tokenizer(state, bool(model.get("ignore_merges")))
        # llama.cpp loads no file without merges. A text of several characters is never at hand where none is made.
        written = [" ".join(merge) for merge in merges] or [" ".join([max(tokens, key=len)] * 2)]
        return Vocabulary(BYTE_LEVEL, pre, tokens, types, [], written, False)
    prefix = _space_prefix(state, begins_with_control)
    scores = _scores_of(model["vocab"], merges, types)
    return Vocabulary(SENTENCE_PIECE, "default", tokens, types, scores, [], prefix)


def _refuse(problem: str) -> None:
    raise UserError("tokenizer.json", problem, _FIX)


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normaliser or pre-tokenizer, of which `Sequence` holds several."""
    if part is None:
        return []
    return [step for inner in part[key] for step in _steps(inner, key)] if part["type"] == "Sequence" else [part]


def _tokens_of(
    tokenizer: "PreTrainedTokenizerFast", model: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Return text and type of each id; llama.cpp finds added tokens in a text as they are spelled there."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        problem = f"its token {max(vocabulary.values())} has no row in the model's embedding, which has {rows}"
        raise UserError("tokenizer.json", problem, "resize the embedding, or give the tokenizer of this model")
    tokens, types = [f"[PAD{id}]" for id in range(rows)], [UNUSED] * rows
    for text, id in vocabulary.items():
        is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x") and text[5] == ">"
        tokens[id], types[id] = text, BYTE if is_byte else NORMAL
    for id, token in tokenizer.added_tokens_decoder.items():
        tokens[id] = token.content if token.special else token.content.replace(_SPACE, " ")
        types[id] = CONTROL if token.special else USER_DEFINED
    unknown = model.get("unk_token")
    if unknown in vocabulary and model.get("byte_fallback"):
        types[vocabulary[unknown]] = UNKNOWN
    if len(set(tokens)) < len(tokens):
        double = next(text for place, text in enumerate(tokens) if text in tokens[:place])
        _refuse(f"two ids have the text {double!r}, which llama.cpp does not allow")
    return tokens, types


def _name_pre_tokenizer(state: Mapping[str, Any], ignore_merges: bool) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's pre-tokenizer.

    Two differences of llama.cpp remain, in rare texts. It normalises none, so NFC is accepted and not written. And in
    its form of the expressions of tekken and gpt-4o, a combining mark ends a word.
    """
    normalisers = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    if any(name != "NFC" for name in normalisers):
        _refuse(f"its tokenizer normalises texts by {', '.join(normalisers)}, and llama.cpp normalises none")
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    names: list[str] = []
    for step in steps:
        if step["type"] == "ByteLevel":
            if step["add_prefix_space"]:
                _refuse("its tokenizer puts a space before a text (ByteLevel, add_prefix_space), llama.cpp does not")
            names += [_GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            names.append(_DIGITS)
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
            names.append(step["pattern"].get("Regex", ""))
        else:
            names.append(json.dumps(step))
    name = _PRE_TOKENIZERS.get((tuple(names), ignore_merges))
    if name is None:
        known = ", ".join(sorted(_PRE_TOKENIZERS.values()))
        found = json.dumps(state["pre_tokenizer"], ensure_ascii=False)
        _refuse(
            f"its pre-tokenizer is none that is known to be in llama.cpp ({known}): {found}, "
            f"ignore_merges {json.dumps(ignore_merges)}"
        )
    return str(name)


def _space_prefix(state: Mapping[str, Any], begins_with_control: bool) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before a text.

    llama.cpp does so at the start and after every control token, or never. A tokenizer that does so only at the start
    is written as one that does so if prompts do not begin with a control token.
    """
    normalisers = _steps(state["normalizer"], "normalizers")
    prefix = False
    for step in normalisers:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE):
            _refuse(f"its tokenizer normalises texts by {json.dumps(step, ensure_ascii=False)}, llama.cpp does not")
    scheme = None
    for step in _steps(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == _SPACE:
            scheme = step["prepend_scheme"]
            if step.get("split", True) and any(_SPACE in text[1:] for text in state["model"]["vocab"]):
                _refuse("it has tokens of several words, but its pre-tokenizer (Metaspace, split) makes none of them")
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:  # no space is left to split at
            found = json.dumps(state["pre_tokenizer"], ensure_ascii=False)
            _refuse(f"its pre-tokenizer is none that is known to be in llama.cpp: {found}")
    if scheme is None and not normalisers:
        _refuse("its tokenizer is neither byte-level nor one of SentencePiece, and llama.cpp knows no other BPE")
    return prefix or scheme == "always" or (scheme == "first" and not begins_with_control)


def _scores_of(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]], types: Sequence[int]) -> list[float]:
    """Return scores by which SentencePiece's joining of pairs follows the order of the merges.

    It joins any two tokens whose text together is a token. So each such pair must be among the merges.

    Raises:
        UserError: The merges were not made from scores, so that no scores give the same ids.
    """
    scores = [0.0 if kind != UNUSED else _PADDING_SCORE for kind in types]
    for group, made in enumerate(_groups_of(merges)):
        for text in made:
            scores[vocabulary[text]] = -float(group + 1)
    pairs = {*merges}
    for text in vocabulary:
        for place in range(1, len(text) if types[vocabulary[text]] == NORMAL else 0):
            left, right = text[:place], text[place:]
            if (
                _is_piece(left, vocabulary, types)
                and _is_piece(right, vocabulary, types)
                and (left, right) not in pairs
            ):
                _refuse(f"its merges do not join {left!r} and {right!r} to {text!r}, and SentencePiece would")
    for id, kind in enumerate(types):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            scores[id] = _ADDED_SCORE
    return scores


def _groups_of(merges: Sequence[tuple[str, ...]]) -> Iterator[list[str]]:
    """Yield the tokens that the merges make, in order; those whose merges alternate together, as they have one score.

    Among pairs with one score SentencePiece joins the leftmost. So do merges for runs of one character only, such as
    spaces, which grow from the left.

    Raises:
        UserError: The merges of other tokens alternate.
    """
    last: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        last[left + right] = place
    group: dict[str, None] = {}
    end = -1
    for place, (left, right) in enumerate(merges):
        group[left + right] = None
        end = max(end, last[left + right])
        if place == end:
            if len(group) > 1 and len(set("".join(group))) > 1:
                names = ", ".join(map(repr, list(group)[:3]))
                _refuse(f"its merges for {names} alternate, and SentencePiece has one score for each")
            yield list(group)
            group = {}


def _is_piece(text: str, vocabulary: Mapping[str, int], types: Sequence[int]) -> bool:
    return text in vocabulary and types[vocabulary[text]] == NORMAL


def special_ids(tokenizer: "PreTrainedTokenizerFast", stops: Iterable[int]) -> dict[str, int]:
    """Return the ids of a file's special tokens by their names: bos, eos, unk, pad, eot and eom.

    llama.cpp ends a generation at eos, eot and eom, and at tokens that it knows by their text.

    Args:
        tokenizer: The tokenizer.
        stops: The ids at which generation ends; the main one first.

    Raises:
        UserError: There are more than llama.cpp has keys for.
    """
    names = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    ids = {name: int(id) for name, id in names.items() if id is not None}
    ends = list(dict.fromkeys(stops))
    texts = {id: str(tokenizer.convert_ids_to_tokens(id)) for id in ends}
    unknown = [id for id in ends[1:] if texts[id] not in _KNOWN_ENDS]
    keyed = [*ends[:1], *unknown, *(id for id in ends[1:] if id not in unknown)]
    if len(unknown) > 2:
        problem = f"generation ends at {', '.join(texts.values())}, and a GGUF file has room for three such tokens"
        raise UserError(
            "generation_config.json", problem, "leave the ones that are never generated out of eos_token_id"
        )
    return ids | {name: int(id) for name, id in zip(("eos", "eot", "eom"), keyed, strict=False)}


def probe_prompt(tokenizer: "PreTrainedTokenizerFast", chat_template: str | None = None) -> tuple[str, bool]:
    """Return a rendered prompt without its BOS, and whether an engine must put BOS before prompts.

    A token that also opens later turns is a marker of the template, and no BOS, whatever the tokenizer calls it.
    Without a chat template, the tokenizer's own encoding of a text decides.

    Args:
        tokenizer: The tokenizer.
        chat_template: Jinja text; None: the tokenizer's own.
    """
    bos: Any = tokenizer.bos_token
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        rendered: Any = tokenizer.apply_chat_template(
            turns, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
        prompt = str(rendered)
    except Exception:  # no template, or one that refuses these turns
        ids = tokenizer.backend_tokenizer.encode("a").ids
        return "", bos is not None and ids[:1] == [tokenizer.bos_token_id]
    if bos and prompt.startswith(bos) and prompt.count(bos) == 1:
        return prompt.removeprefix(bos), True
    return prompt, False


# Tokens at which llama.cpp ends a generation because of their text, without a key.
_KNOWN_ENDS = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>"})
