"""Tools, calls and results in mistral-v3 against mistral-common; what it refuses is named and counted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool
from mistral_common.protocol.instruct.tool_calls import ToolCall as ReferenceCall

from minisft.data.conversation import Conversation, Message, ToolCall
from minisft.data.encoder import Encoder
from minisft.data.verification import verify
from tests.unit.data.mistral import fast_tokenizer, prompt_reference, reference

texts = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=12), st.sampled_from(["[TOOL_CALLS]", "[/TOOL_RESULTS]", "</s>", " ", "7", "▁"])
    ),
    min_size=1,
    max_size=4,
).map("".join)
answers = texts.filter(lambda text: text.strip() != "")
names = st.from_regex(r"[a-zA-Z_]{1,10}", fullmatch=True)
values = st.one_of(st.integers(), st.booleans(), texts, st.lists(st.integers(), max_size=2))
arguments = st.dictionaries(st.text(min_size=1, max_size=5), values, max_size=3)
results = st.one_of(texts, arguments.map(json.dumps), st.sampled_from(["12", "null", "[1,2]", '{"a":1}', ""]))
calls = st.lists(st.tuples(names, arguments), min_size=1, max_size=2)
# One exchange: a question, some rounds of calls with their results, an answer.
exchanges = st.lists(st.tuples(texts, st.lists(calls, max_size=2), answers, results), min_size=1, max_size=3)
schemas = st.dictionaries(names, st.sampled_from([{"type": "string"}, {"type": "integer"}]), max_size=2).map(
    lambda properties: {"type": "object", "properties": properties}
)
tools = st.lists(
    st.fixed_dictionaries({"name": names, "description": texts, "parameters": schemas}), min_size=1, max_size=2
)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(fast_tokenizer("v3"), "mistral-v3")


def both(system, exchanges):
    """The same conversation as our messages and as mistral-common's."""
    ours = [] if system is None else [Message("system", system)]
    theirs: list = [] if system is None else [SystemMessage(content=system)]
    number = 0
    for question, rounds, answer, result in exchanges:
        ours.append(Message("user", question))
        theirs.append(UserMessage(content=question))
        for made in rounds:
            ids = [f"call{number + i:05}" for i in range(len(made))]
            number += len(made)
            texts = [json.dumps(given, ensure_ascii=False) for _, given in made]
            ours.append(
                Message(
                    "assistant",
                    "",
                    tool_calls=tuple(
                        ToolCall(name, text, id) for (name, _), text, id in zip(made, texts, ids, strict=True)
                    ),
                )
            )
            theirs.append(
                AssistantMessage(
                    content=None,
                    tool_calls=[
                        ReferenceCall(id=id, function=FunctionCall(name=name, arguments=text))
                        for (name, _), text, id in zip(made, texts, ids, strict=True)
                    ],
                )
            )
            for id in ids:
                ours.append(Message("tool", result, call_id=id))
                theirs.append(ToolMessage(content=result, tool_call_id=id))
        ours.append(Message("assistant", answer))
        theirs.append(AssistantMessage(content=answer))
    return ours, theirs


def expected_labels(encoder, ids):
    """Answers begin behind [/INST] or [/TOOL_RESULTS] and end with EOS: then the next turn begins."""
    openers = set(encoder.tokenizer.convert_tokens_to_ids(["[/INST]", "[/TOOL_RESULTS]"]))
    closers = set(encoder.tokenizer.convert_tokens_to_ids(["[INST]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]))
    labels, learned = [], False
    for id in ids:
        learned = learned and id not in closers
        labels.append(id if learned else -100)
        learned = (learned and id != encoder.tokenizer.eos_token_id) or id in openers
    return labels


def assert_like_reference(encoder, system, exchanges, tools):
    ours, theirs = both(system, exchanges)
    offered = json.dumps([{"type": "function", "function": tool} for tool in tools])
    functions = [Tool(function=Function(**tool)) for tool in tools]
    ids = reference("v3").encode_chat_completion(ChatCompletionRequest(messages=theirs, tools=functions or None)).tokens
    conversation = Conversation(tuple(ours), tools=offered if tools else "")
    encoded = encoder.encode(conversation)
    assert encoded.input_ids == ids
    assert encoded.labels == expected_labels(encoder, ids)
    assert not {"call_id_missing", "tools_as_text", "text_before_calls"} & set(encoded.findings)
    verify(encoder, [conversation], encoder.encode_batch([conversation]))
    prompt = encoder.encode_prompt(ours[:-1], conversation.tools)
    request = ChatCompletionRequest(messages=theirs[:-1], tools=functions or None)
    assert prompt == prompt_reference("v3").encode_chat_completion(request).tokens
    assert ids[: len(prompt)] == prompt


@settings(max_examples=120)
@given(system=st.none() | texts, exchanges=exchanges, tools=st.just([]) | tools)
def test_tools_have_the_ids_of_mistral_common(system, exchanges, tools, encoder):
    assert_like_reference(encoder, system, exchanges, tools)


@pytest.mark.long
@settings(max_examples=2000)
@given(system=st.none() | texts, exchanges=exchanges, tools=st.just([]) | tools)
def test_tools_are_encoded_as_mistral_common_does_in_thousands_of_cases(system, exchanges, tools, encoder):
    assert_like_reference(encoder, system, exchanges, tools)


CALL = ToolCall("menu", '{"size": "small"}')
TALK = (
    Message("user", "What is there?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "espresso"),
    Message("assistant", "Espresso."),
)


def test_what_mistral_common_refuses_is_written_and_named(encoder):
    encoded = encoder.encode(Conversation(TALK))
    pieces = encoder.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert encoded.findings == ("call_id_missing",)
    assert [piece for piece in pieces if piece.startswith("[")] == [
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ]
    spoken = (TALK[0], Message("assistant", "One moment.", tool_calls=(CALL,)), *TALK[2:])
    conversation = Conversation(spoken)
    assert encoder.encode(conversation).findings == ("call_id_missing", "text_before_calls")
    verify(encoder, [conversation], encoder.encode_batch([conversation]))


def test_a_tokenizer_without_tool_tokens_writes_tools_as_text_and_names_it(llama_like):
    encoder = Encoder(llama_like, "mistral")
    for conversation in (Conversation(TALK), Conversation((TALK[0], TALK[3]), tools='[{"name": "menu"}]')):
        assert "tools_as_text" in encoder.encode(conversation).findings
    assert not encoder.encode(Conversation((TALK[0], TALK[3]))).findings


def test_the_saved_jinja_text_renders_calls_and_results_the_same(encoder):
    tokenizer = encoder.tokenizer
    call: dict = {"id": "call00001", "function": {"name": "menu", "arguments": {"size": "small", "n": [1, 2]}}}
    for result in ("espresso", '["espresso", "tea"]', "12", "1.5", "null", ""):
        rows = [
            {"role": "user", "content": "What is there?"},
            {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "call00002"}]},
            {"role": "tool", "content": result, "tool_call_id": "call00001"},
            {"role": "tool", "content": result, "tool_call_id": "call00002"},
        ]
        calls = tuple(ToolCall("menu", json.dumps(call["function"]["arguments"]), f"call0000{i}") for i in (1, 2))
        ours = (
            TALK[0],
            Message("assistant", "", tool_calls=calls),
            *(Message("tool", result, call_id=made.id) for made in calls),
        )
        offered = [
            {"type": "function", "function": {"name": "menu", "parameters": {"type": "object"}, "returns": "text"}}
        ]
        theirs = tokenizer.apply_chat_template(rows, tools=offered, chat_template=encoder.chat_template)["input_ids"]
        assert theirs == encoder.encode_prompt(ours, json.dumps(offered)), result
