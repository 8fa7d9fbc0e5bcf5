"""Ids and labels of ten conversations in every template, as text to be read in review.

A line is a stretch of tokens, `id:piece` each; `+` before it means that it is learned, `-` that it is not.
`MINISFT_WRITE_GOLDEN=1 pytest tests/golden` writes the files again: read the difference before it is committed.
"""

import json
import os
from itertools import groupby
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from minisft.data.conversation import Conversation, Message, ToolCall
from minisft.data.encoder import Encoder
from minisft.data.renderers.base import RefusedError
from tests.unit.data.mistral import fast_tokenizer
from tests.unit.data.test_published_templates import FOLDER as PUBLISHED

HERE = Path(__file__).parent
U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
CALL = Message("assistant", "", tool_calls=(ToolCall("menu", '{"size": "small"}', "call00001"),))
RESULT = Message("tool", '["espresso"]', call_id="call00001")
CONVERSATIONS = {
    "one exchange": (U("Hello"), A("Hi there!")),
    "two exchanges": (U("What is 6 x 7?"), A("42."), U("And 6 + 7?"), A("13.")),
    "a system prompt": (S("Answer briefly."), U("Hello"), A("Hi.")),
    "a system prompt and two exchanges": (S("Answer briefly."), U("a"), A("b"), U("c"), A("d")),
    "white space around": (U("  Hello \n"), A(" Hi. \n ")),
    "an answer that is not learned": (U("a"), Message("assistant", "wrong", supervised=False), U("c"), A("right")),
    "text that spells control tokens": (U("<|im_end|> [/INST] </s>"), A("[INST] <|im_start|> <s>")),
    "other scripts": (U("你好，咖啡？"), A("Ça va ☕ — да")),
    "code": (U("Add two numbers"), A("```python\ndef add(a, b):\n    return a + b\n```")),
    "a call and its result": (U("What do you have?"), CALL, RESULT, A("Espresso.")),
}
TEMPLATES = {
    "chatml": ("toy", "chatml"),
    "chatml-plain-text": ("toy-plain", "chatml"),
    "llama3-plain-text": ("toy", "llama3"),
    "zephyr": ("toy", "zephyr"),
    "mistral-plain-text": ("toy", "mistral"),
    "mistral-v1": ("v1", "mistral-v1"),
    "mistral-v2": ("v2", "mistral-v2"),
    "mistral-v3": ("v3", "mistral-v3"),
    "mistral-v7": ("v7", "mistral-v7"),
    "mistral-v11": ("tekken-v11", "mistral-v11"),
    "mistral-v13": ("tekken-v13", "mistral-v13"),
    "jinja-smollm2": ("toy", str(PUBLISHED / "smollm2.jinja")),
    "jinja-qwen25": ("toy", str(PUBLISHED / "qwen25.jinja")),
}


def load(kind):
    if not kind.startswith("toy"):
        return fast_tokenizer(kind)
    eos = "<|im_end|>" if kind == "toy" else "<|endoftext|>"
    core = json.loads((HERE / "toy_tokenizer.json").read_text(encoding="utf-8"))
    if kind == "toy-plain":
        core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] == "<|endoftext|>"]
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token=eos, pad_token=eos)


def describe(template):
    kind, name = TEMPLATES[template]
    tokenizer = load(kind)
    encoder = Encoder(tokenizer, name)
    parts = [f"# {template}; stops at {tokenizer.convert_ids_to_tokens(list(encoder.stop_token_ids))}"]
    for title, messages in CONVERSATIONS.items():
        parts += ["", f"## {title}", *_lines(encoder, tokenizer, messages)]
    return "\n".join(parts) + "\n"


def _lines(encoder, tokenizer, messages):
    try:
        encoded = encoder.encode(Conversation(messages))
    except RefusedError as refusal:
        yield f"refused: {refusal.reason}"
        return
    if encoded.findings:
        yield f"found: {', '.join(encoded.findings)}"
    pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    tokens = zip(encoded.input_ids, pieces, encoded.labels, strict=True)
    for learned, group in groupby(tokens, key=lambda token: token[2] >= 0):
        yield f"{'+' if learned else '-'} " + " ".join(f"{id}:{piece}" for id, piece, _ in group)


@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_are_those_of_the_golden_file(template):
    path = HERE / f"{template}.txt"
    made = describe(template)
    if os.environ.get("MINISFT_WRITE_GOLDEN"):
        path.write_text(made, encoding="utf-8")
    assert made == path.read_text(encoding="utf-8")
