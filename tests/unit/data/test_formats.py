"""Rows in the usual shapes to conversations."""

import json

import pytest

from minisft.data.conversation import Message, ToolCall, messages_from_rows
from minisft.data.formats import FORMATS, RowError, check_order, detect_format, repair, to_conversation

U, A, S = Message("user", "Hi"), Message("assistant", "Hello"), Message("system", "Be kind")


def convert(row):
    return to_conversation(row, "f:1", detect_format(row) or "")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, (U, A)),
        ({"conversation": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}]}, (U, A)),
        ({"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, (U, A)),
        ({"conversations": [{"from": "Human", "value": "Hi"}, {"from": "bing", "value": "Hello"}], "system": "Be kind"}, (S, U, A)),
        ({"messages": [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Hello"}]}, (S, U, A)),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, (U, A)),
        ({"instruction": "Hi", "response": "Hello", "system": "Be kind"}, (S, U, A)),
        ({"instruction": "Hi", "input": "there", "output": "Hello"}, (Message("user", "Hi\nthere"), A)),
        ({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]]}, (U, A, U, A)),
        ({"prompt": "Hi", "completion": "Hello"}, (Message("user", "Hi", supervised=False), A)),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}, (Message("user", "Hi", supervised=False), A)),
    ],
)  # fmt: skip
def test_shapes(row, messages):
    assert convert(row).messages == messages


def test_only_the_completion_is_learned():
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Hi"},
    ]
    messages = convert({"prompt": prompt, "completion": "Hello"}).messages
    assert [message.supervised for message in messages if message.is_answer] == [False, True]


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"train": "false"}]
)
def test_train_flags_are_honoured(flag):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **flag}]}
    assert not convert(row).messages[1].supervised


def test_tools_calls_and_results():
    call = '{"name": "add", "arguments": {"a": 1}}'
    turns = [("human", "Hi"), ("function_call", call), ("observation", "3"), ("gpt", "It is 3")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns], "tools": '[{"name": "add"}]'}
    conversation = convert(row)
    assert [message.role for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].tool_calls == (ToolCall("add", '{"a": 1}', source=call),)
    assert conversation.messages[1].text == call
    assert json.loads(conversation.tools) == [{"name": "add"}]
    check_order(conversation.messages)


def test_openai_calls_names_and_reasoning():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row: dict[str, list[dict]] = {
        "messages": [
            {"role": "user", "content": "Hi", "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm"},
            {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "It is 3"},
        ]
    }
    asked, called, answered, _ = convert(row).messages
    assert asked.name == "Ann"
    assert called == Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 1}', "c1"),), reasoning="Hm")
    assert called.text == '{"name": "add", "arguments": {"a": 1}}'
    assert (answered.name, answered.call_id) == ("add", "c1")


def test_the_id_of_a_row_is_its_own_or_its_location():
    assert convert({"prompt": "Hi", "completion": "Hello", "id": 7}).id == "7"
    assert convert({"prompt": "Hi", "completion": "Hello"}).id == "f:1"


def test_unknown_shapes_have_no_format():
    unknown: list = [{}, {"text": "a"}, [], None, 5]
    assert [detect_format(row) for row in unknown] == [None] * 5
    for format in FORMATS:
        with pytest.raises(RowError, match="missing_keys"):
            to_conversation({}, "f:1", format)


@pytest.mark.parametrize(
    ("messages", "repaired", "done"),
    [
        ((A, U, A), (U, A), ("leading_answers_trimmed",)),
        ((S, A, U, A), (S, U, A), ("leading_answers_trimmed",)),
        ((A, S, U, A), (S, U, A), ("leading_answers_trimmed",)),
        ((S, A, Message("system", "Be brief"), U, A), (Message("system", "Be kind\n\nBe brief"), U, A), ("leading_answers_trimmed", "same_role_joined")),
        ((U, A, U), (U, A), ("unanswered_end_trimmed",)),
        ((U, U, A), (Message("user", "Hi\n\nHi"), A), ("same_role_joined",)),
        ((S, S, U, A), (Message("system", "Be kind\n\nBe kind"), U, A), ("same_role_joined",)),
        ((U, A, Message("user", "x"), Message("assistant", " ")), (U, A), ("unanswered_end_trimmed",)),
        ((A, U, A, A, U), (U, Message("assistant", "Hello\n\nHello")), ("leading_answers_trimmed", "unanswered_end_trimmed", "same_role_joined")),
    ],
)  # fmt: skip
def test_repair(messages, repaired, done):
    assert repair(messages) == (repaired, done)
    check_order(repaired)


@pytest.mark.parametrize("messages", [(U,), (A,), (S,), (A, S, A), ()])
def test_what_has_no_exchange_cannot_be_repaired(messages):
    with pytest.raises(RowError):
        check_order(repair(messages)[0])


def test_messages_come_back_from_dataset_rows():
    assert messages_from_rows([{"role": "user", "content": "Hi"}]) == (U,)
