"""Pieces of an answer: whole characters, stop texts, reasoning and calls, whatever the tokens are."""

import random

import pytest

from minisft.data.encoder import Encoder
from minisft.evaluation.generation import TokenScores
from minisft.serving.answer_text import AnswerText, find_calls
from tests.tiny import byte_tokenizer
from tests.unit.serving.scripted import byte_encoder, ids_of

# Writes reasoning as Qwen3's template does.
REASONING = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def encoder():
    return byte_encoder()


def pieces_of(text, ids, finish="length"):
    pieces = []
    for token in ids:
        pieces.append(text.push(token, None))
        if text.stopped:
            finish = "interrupted"
            break
    return [*pieces, text.finish(finish)]


def joined(pieces, key="content"):
    return "".join(getattr(piece, key) for piece in pieces)


def test_characters_of_several_bytes_come_whole(encoder):
    said = "é 日本 👩‍👧 end"
    pieces = pieces_of(AnswerText(encoder), ids_of(said))
    assert joined(pieces) == said
    assert all("\ufffd" not in piece.content for piece in pieces)
    assert pieces[-1].finish == "length"
    assert pieces[-1].count == len(said.encode())


def test_bytes_that_are_no_character_are_told_at_the_end(encoder):
    half = ids_of("é")[:1]
    assert joined(pieces_of(AnswerText(encoder), [*ids_of("a"), *half])) == "a\ufffd"
    assert joined(pieces_of(AnswerText(encoder), [*ids_of("a"), *half, *ids_of("b")])) == "a\ufffdb"


@pytest.mark.parametrize("seed", range(40))
def test_nothing_of_a_stop_text_is_ever_sent(encoder, seed):
    choose = random.Random(seed)
    said = "".join(choose.choice("ab é") for _ in range(60))
    stops = ["".join(choose.choice("abé ") for _ in range(choose.randint(2, 5))) for _ in range(2)]
    places = [place for stop in stops if (place := said.find(stop)) >= 0]
    expected = said[: min(places)] if places else said
    text = AnswerText(encoder, stops)
    pieces = pieces_of(text, ids_of(said))
    assert joined(pieces) == expected
    assert text.stopped == bool(places)
    assert pieces[-1].finish == ("stop" if places else "length")
    if places:  # it ended at the first token at which a stop text was whole
        ends = min(said.find(stop) + len(stop) for stop in stops if stop in said)
        assert pieces[-1].count <= len(said[:ends].encode())


def test_probabilities_come_with_their_text_and_end_before_a_stop_text(encoder):
    text = AnswerText(encoder, ["XY"])
    pieces = [text.push(token, TokenScores(-0.5, ((token, -0.5),))) for token in ids_of("ab éXXY")]
    assert text.stopped
    pieces.append(text.finish("interrupted"))
    assert joined(pieces) == "ab éX"
    tokens = [token for piece in pieces for token in piece.tokens]
    assert b"".join(token.spelling for token in tokens).decode() == "ab éX"
    assert [token.offset for token in tokens] == [0, 1, 2, 3, 3, 4]
    for piece in pieces:
        assert bool(piece.tokens) == bool(piece.content)


def test_reasoning_is_told_apart_while_it_comes():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = REASONING
    encoder = Encoder(tokenizer)
    said = "<think>\nIs a < b?\n\nYes </th> so\n</think>\n\nIt is.\n"
    pieces = pieces_of(AnswerText(encoder), ids_of(said))
    assert joined(pieces, "reasoning") == "Is a < b?\n\nYes </th> so"
    assert joined(pieces) == "It is.\n"
    assert (joined(pieces, "reasoning"), joined(pieces)) == encoder.split_answer(ids_of(said))
    plain = pieces_of(AnswerText(encoder), ids_of("<thin ice"))
    assert joined(plain) == "<thin ice"


CALLS = [
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    ('See: <tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": "{}"}</tool_call>',
     "See:", [("f", "{}"), ("g", "{}")]),
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}]', "", [("f", '{"a": [1]}')]),
    ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}', "", [("f", '{"a": 1}'), ("g", "{}")]),
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ('I ask.\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}', "I ask.", [("f", "{}"), ("g", "{}")]),
    ('[{"name": "f"},\n {"name": "g"}]', "", [("f", "{}"), ("g", "{}")]),
    ('{"name": "f"}\nand more', '{"name": "f"}\nand more', []),
    ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ("[1] is a footnote", "[1] is a footnote", []),
    ("no call < here", "no call < here", []),
]  # fmt: skip


@pytest.mark.parametrize(("said", "content", "calls"), CALLS)
def test_calls_are_told_apart_from_text(encoder, said, content, calls):
    tools = frozenset(["f", "g"])
    text, found = find_calls(said, said, tools)
    assert (text, [(call.name, call.arguments) for call in found]) == (content, calls)
    pieces = pieces_of(AnswerText(encoder, tools=tools), ids_of(said), "stop")
    assert joined(pieces).strip() == content
    assert [(call.name, call.arguments) for call in pieces[-1].calls] == calls
    assert pieces[-1].finish == ("tool_calls" if calls else "stop")
    assert joined(pieces_of(AnswerText(encoder), ids_of(said))) == said  # without tools on offer it is text
