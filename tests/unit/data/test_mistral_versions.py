"""The Mistral forms v2 to v13 against mistral-common, with system prompts, tools, calls and results."""

import json
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool
from mistral_common.protocol.instruct.tool_calls import ToolCall as ReferenceCall

from minisft.data.conversation import Conversation, Message, ToolCall, message_as_dict
from minisft.data.encoder import Encoder
from minisft.data.verification import verify
from tests.unit.data.mistral import fast_tokenizer, prompt_reference, reference

# The tokenizer and the form that is named for it.
TOKENIZERS = {
    "v2": "mistral-v2",
    "v3": "mistral-v3",
    "v7": "mistral-v7",
    "v7m1": "mistral-v7",
    "tekken-v3": "mistral-v3",
    "tekken-v7": "mistral-v7",
    "tekken-v11": "mistral-v11",
    "tekken-v13": "mistral-v13",
}
SPELLED = [
    "[INST]",
    "[/INST]",
    "<s>",
    "</s>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[SYSTEM_PROMPT]",
    "[control_8]",
    "▁",
    "  ",
    "\n",
    "☺",
]
texts = st.lists(st.one_of(st.text(max_size=15), st.sampled_from([*SPELLED, "Hello", " so ", "42."])), max_size=5).map(
    "".join
)
answers = texts.filter(bool)
names = st.from_regex(r"[a-zA-Z_-]{1,10}", fullmatch=True)
values = st.one_of(st.integers(), st.booleans(), texts, st.lists(st.integers(), max_size=2))
arguments = st.dictionaries(st.text(min_size=1, max_size=5), values, max_size=3)
results = st.one_of(
    texts, arguments.map(json.dumps), st.sampled_from(["12", "null", "[1,2]", '{"a":1}', "1.50", " x "])
)
# A round is a text before the calls (from v7 on), the calls, each with its result, and the order of the results.
rounds = st.tuples(
    texts, st.lists(st.tuples(names, arguments, results), min_size=1, max_size=3), st.randoms(use_true_random=False)
)
# An exchange is a system prompt, questions, rounds of calls and answers; neighbours of one role are joined.
exchanges = st.lists(
    st.tuples(
        st.none() | texts,
        st.lists(texts, min_size=1, max_size=2),
        st.lists(rounds, max_size=2),
        st.lists(answers, min_size=1, max_size=2),
    ),
    min_size=1,
    max_size=3,
)
schemas = st.dictionaries(names, st.sampled_from([{"type": "string"}, {"type": "integer"}]), max_size=2).map(
    lambda properties: {"type": "object", "properties": properties}
)
functions = st.fixed_dictionaries({"name": names, "description": texts, "parameters": schemas})
offers = st.lists(functions, max_size=2)


@cache
def encoder_of(version):
    return Encoder(fast_tokenizer(version), TOKENIZERS[version])


def both(version, exchanges):
    """The same conversation as our messages and as mistral-common's; v2 takes one call of a turn, v2 and v3 no text."""
    ours: list[Message] = []
    theirs: list = []
    number = 0
    for system, questions, rounds, answers in exchanges:
        turns = [("user", text) for text in questions]
        if system is not None:  # after an answer it is no valid turn, but after a question it is
            turns.insert(1 if ours else 0, ("system", system))
        for role, text in turns:
            ours.append(Message(role, text))
            theirs.append(SystemMessage(content=text) if role == "system" else UserMessage(content=text))
        for text, made, random in rounds:
            made, text = made[:1] if version == "v2" else made, "" if version.endswith(("v2", "v3")) else text
            calls = [
                (name, json.dumps(given, ensure_ascii=False), f"call{number + i:05}")
                for i, (name, given, _) in enumerate(made)
            ]
            number += len(made)
            ours.append(Message("assistant", text, tool_calls=tuple(ToolCall(*call) for call in calls)))
            called = [ReferenceCall(id=id, function=FunctionCall(name=n, arguments=given)) for n, given, id in calls]
            theirs.append(AssistantMessage(content=text or None, tool_calls=called))
            answered = [(name, id, result) for (name, _, id), (_, _, result) in zip(calls, made, strict=True)]
            random.shuffle(answered)
            for name, id, result in answered:
                ours.append(Message("tool", result, name=name, call_id=id))
                theirs.append(ToolMessage(content=result, name=name, tool_call_id=id))
        for text in answers:
            ours.append(Message("assistant", text))
            theirs.append(AssistantMessage(content=text))
    return tuple(ours), theirs


def assert_like_reference(version, exchanges, offered):
    encoder = encoder_of(version)
    ours, theirs = both(version, exchanges)
    tools = json.dumps([{"type": "function", "function": function} for function in offered]) if offered else ""
    asked = [Tool(function=Function(**function)) for function in offered] or None
    # 1. The row and its labels. v2 leaves earlier calls out, so only the last answer is learned.
    ids = reference(version).encode_chat_completion(ChatCompletionRequest(messages=theirs, tools=asked)).tokens
    conversation = Conversation(ours, tools=tools).supervise("last" if version == "v2" else "assistant")
    encoded = encoder.encode(conversation)
    assert encoded.input_ids == ids, encoder.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    if version != "v2":
        assert encoded.labels == expected_labels(encoder, ids)
    verify(encoder, [conversation], encoder.encode_batch([conversation]))
    # 2. The prompt of the last answer, unless it is joined with the message before.
    if ours[-2].role == "assistant":
        return
    prompt = encoder.encode_prompt(ours[:-1], tools)
    request = ChatCompletionRequest(messages=theirs[:-1], tools=asked)
    assert prompt == prompt_reference(version).encode_chat_completion(request).tokens
    assert ids[: len(prompt)] == prompt


def expected_labels(encoder, ids):
    """Answers begin where a question or a result ends, and end with EOS."""
    openers = {"[/INST]", "[/TOOL_RESULTS]", "[/SYSTEM_PROMPT]"}
    others = {"[INST]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[SYSTEM_PROMPT]"}
    controls = {id: token.content for id, token in encoder.tokenizer.added_tokens_decoder.items()}
    labels, learned = [], False
    for id in ids:
        control = controls.get(id)
        learned = learned and control not in others
        labels.append(id if learned else -100)
        learned = (learned and id != encoder.tokenizer.eos_token_id) or control in openers
    return labels


@pytest.mark.parametrize("version", TOKENIZERS)
@settings(max_examples=60)
@given(exchanges=exchanges, offered=offers)
def test_ids_labels_and_prompts_are_those_of_mistral_common(version, exchanges, offered):
    assert_like_reference(version, exchanges, offered)


@pytest.mark.long
@pytest.mark.parametrize("version", TOKENIZERS)
@settings(max_examples=400)
@given(exchanges=exchanges, offered=offers)
def test_ids_are_those_of_mistral_common_in_400_of_400_conversations(version, exchanges, offered):
    assert_like_reference(version, exchanges, offered)


def plain_exchanges(random):
    """Exchanges of texts whose joint and separate encodings are equal."""

    def words():
        return " ".join(random.choices(["tea", "milk", "two", "Ça va ☕", "{x}", "'so'", "\n"], k=random.randint(1, 4)))

    def call():
        result = random.choice(["two", '["tea"]', "12", "null", "tea {x}", "", "Ça va"])
        return random.choice(["menu", "get-x"]), {"size": words(), "n": random.randint(0, 9)}, result

    for _ in range(random.randint(1, 3)):
        rounds = [
            (random.choice(["", words()]), [call() for _ in range(random.randint(1, 3))], random)
            for _ in range(random.randint(0, 2))
        ]
        yield random.choice([None, words()]), [words()], rounds, [words()]


@pytest.mark.parametrize("version", TOKENIZERS)
@pytest.mark.parametrize("offered", [[], [{"name": "menu", "description": "Ça", "parameters": {"type": "object"}}]])
def test_the_saved_jinja_text_renders_the_same_ids(version, offered):
    encoder, random = encoder_of(version), Random(0)
    tools = [{"type": "function", "function": function} for function in offered]
    for _ in range(30):
        ours, _ = both(version, plain_exchanges(random))
        conversation = Conversation(ours, tools=json.dumps(tools) if tools else "").supervise("last")
        for messages, ids in (
            (ours, encoder.encode(conversation).input_ids),
            (ours[:-1], encoder.encode_prompt(ours[:-1], conversation.tools)),
        ):
            rendered = encoder.tokenizer.apply_chat_template(
                [message_as_dict(message) for message in messages],
                tools=tools or None,
                chat_template=encoder.chat_template,
                add_generation_prompt=len(messages) < len(ours),
            )
            assert rendered["input_ids"] == ids, encoder.tokenizer.decode(rendered["input_ids"])


@pytest.mark.parametrize("version", TOKENIZERS)
def test_the_saved_jinja_text_is_read_as_the_form_that_it_is_of(version):
    encoder = encoder_of(version)
    assert Encoder(encoder.tokenizer, encoder.chat_template).template_name == TOKENIZERS[version]
