"""mistral-common's tokenizers as fast ones, and its own encoding to compare with.

v1, v2, v3, v7 and v7m1 are its SentencePiece models, tekken-v3 to tekken-v15 are its tekken vocabulary.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

import mistral_common
import sentencepiece
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral import convert_tekken_tokenizer

FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v7m1": "mistral_instruct_tokenizer_241114.model.v7m1",
    "tekken-v3": "tekken_240718.json",
}
FOLDER = Path(mistral_common.__file__).parent / "data"
MESSAGES = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


def model_file(version: str) -> Path:
    return FOLDER / FILES[version] if version in FILES else tekken_file(version.removeprefix("tekken-"))


@cache
def tekken_file(version: str, tokens: int = 3000) -> Path:
    """The beginning of mistral-common's tekken vocabulary as a file of another version, which the wheel does not hold.

    Versions above v7 list their control tokens themselves.
    """
    content = json.loads((FOLDER / "tekken_240911.json").read_text(encoding="utf-8"))
    strings = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]  # or members of an enumeration
    names = [str(getattr(string, "value", string)) for string in strings]
    names += ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"] if version in ("v11", "v13", "v15") else []
    names += ["[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"] if version == "v15" else []
    special = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    content["config"] |= {
        "version": version, "default_num_special_tokens": 40, "default_vocab_size": 40 + tokens, "num_vocab_tokens": tokens
    }  # fmt: skip
    content |= {"vocab": content["vocab"][:tokens], "special_tokens": special}
    del content["image"]
    path = Path(tempfile.mkdtemp()) / "tekken.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@cache
def reference(version: str) -> MistralTokenizer:
    return MistralTokenizer.from_file(str(model_file(version)), mode=ValidationMode("finetuning"))


@cache
def prompt_reference(version: str) -> MistralTokenizer:
    return MistralTokenizer.from_file(str(model_file(version)), mode=ValidationMode("test"))


@cache
def fast_tokenizer(version: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer that states no version, as one from tokenizer.json does."""
    if version.startswith("tekken"):
        return convert_tekken_tokenizer(str(model_file(version)), chat_template="")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file(version)))
    size = pieces.get_piece_size()
    vocabulary = {pieces.id_to_piece(i): i for i in range(size)}
    ordinary = {pieces.id_to_piece(i) for i in range(size) if not pieces.is_control(i) and not pieces.is_byte(i)}
    scores = {piece: pieces.get_score(vocabulary[piece]) for piece in ordinary}
    core = Tokenizer(
        models.BPE(vocabulary, merges(vocabulary, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    controls = [pieces.id_to_piece(i) for i in range(size) if pieces.is_control(i)]
    core.add_special_tokens([AddedToken(name, normalized=False) for name in ["<unk>", *controls]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model: the piece with the highest score first.

    Runs of spaces all have one score. SentencePiece then merges from the left, so a run grows before another starts.
    """
    found = []
    for piece, score in scores.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        select_kernel = [(left, right) for left, right in splits if left in scores and right in scores]
        found += [(-score, -len(left), vocabulary[left], (left, right)) for left, right in select_kernel]
    return [pair for _, _, _, pair in sorted(found)]


def request(messages: list[tuple[str, str]]) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=[MESSAGES[role](content=content) for role, content in messages])


def reference_ids(version: str, messages: list[tuple[str, str]]) -> list[int]:
    return reference(version).encode_chat_completion(request(messages)).tokens


def reference_prompt(version: str, messages: list[tuple[str, str]]) -> list[int]:
    return prompt_reference(version).encode_chat_completion(request(messages)).tokens


def reference_labels(version: str, messages: list[tuple[str, str]], ids: list[int]) -> list[int]:
    """Labels from mistral-common's own parts: an answer's ids and EOS learned, the rest not.

    Each answer is encoded by itself and looked for behind its prompt, which mistral-common encodes too.
    """
    core = reference(version).instruct_tokenizer.tokenizer
    labels = [-100] * len(ids)
    position = len(ids)
    for role, content in reversed(messages):
        if role != "assistant":
            continue
        text = content if version == "v1" else content.rstrip(" ")
        answer = [*core.encode(text, bos=False, eos=False), core.eos_id]
        while ids[position - len(answer) : position] != answer:
            position -= 1
            assert position >= len(answer), "mistral-common's tokens do not hold this answer"
        labels[position - len(answer) : position] = answer
        position -= len(answer)
    return labels
