"""The type that a row of every source becomes: a conversation of messages."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
JOIN = "\n\n"  # between joined messages, and between a system prompt and the text that follows it


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant makes.

    Args:
        name: The function's name.
        arguments: The arguments as a JSON text.
        id: The call's identifier, where the data has one.
        source: The call as the data spells it, where it is kept as text.
    """

    name: str
    arguments: str
    id: str = ""
    source: str = ""

    @property
    def text(self) -> str:
        """Return the call as plain text, for templates that have no form for calls."""
        if self.source:
            return self.source
        return json.dumps({"name": self.name, "arguments": parsed_or_text(self.arguments)}, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Args:
        role: One of ROLES.
        content: The text, without calls and reasoning.
        supervised: Whether an assistant's message is trained on; messages of other roles never are.
        tool_calls: The calls that an assistant's message makes.
        name: The tool's (or speaker's) name, where the data has one.
        reasoning: An assistant's reasoning, where the data separates it from the content.
        call_id: On a tool's message, the id of the call that it answers.
    """

    role: str
    content: str
    supervised: bool = True
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    reasoning: str = ""
    call_id: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is not one of {', '.join(ROLES)}")

    @property
    def text(self) -> str:
        """Return content and calls as one plain text."""
        if not self.tool_calls:
            return self.content
        parts = [self.content] if self.content else []
        return "\n".join(parts + [call.text for call in self.tool_calls])

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation with its place in the source.

    Args:
        messages: The turns in order.
        id: The row's id, or its location where it has none.
        location: "file:line" or "split:index", which errors about the row name.
        tools: The functions on offer as a JSON list, or "".
    """

    messages: tuple[Message, ...]
    id: str = ""
    location: str = ""
    tools: str = ""

    @property
    def answers(self) -> tuple[Message, ...]:
        return tuple(message for message in self.messages if message.is_answer)

    def supervise(self, train_on: str) -> "Conversation":
        """Return the conversation; where `train_on` is "last", with only its last answer supervised."""
        if train_on != "last":
            return self
        answers = [i for i, message in enumerate(self.messages) if message.is_answer]
        return self.without_loss(answers[:-1])

    def without_loss(self, places: Sequence[int]) -> "Conversation":
        """Return the conversation with the messages at some places not supervised."""
        messages = tuple(
            replace(message, supervised=False) if place in places else message
            for place, message in enumerate(self.messages)
        )
        return replace(self, messages=messages)


def join_same_role_messages(messages: Sequence[Message]) -> list[Message]:
    """Join adjacent messages of one role by an empty line, as mistral-common does; tools' results stay separate."""
    joined: list[Message] = []
    for message in messages:
        if not joined or joined[-1].role != message.role or message.role == "tool":
            joined.append(message)
            continue
        first = joined[-1]
        joined[-1] = replace(
            first,
            content=JOIN.join(text for text in (first.content, message.content) if text),
            reasoning=JOIN.join(text for text in (first.reasoning, message.reasoning) if text),
            tool_calls=first.tool_calls + message.tool_calls,
            supervised=first.supervised and message.supervised,
        )
    return joined


def parsed_or_text(text: str) -> Any:
    """Return the JSON value that a text spells, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def message_from_row(row: Mapping[str, Any]) -> Message:
    """Return the message of an entry of a dataset row's `messages`, or of any other role/content pair."""
    calls = json.loads(row.get("tool_calls") or "[]")
    return Message(
        role=row["role"],
        content=row["content"],
        supervised=row.get("supervised", True),
        tool_calls=tuple(ToolCall(**call) for call in calls),
        name=row.get("name") or "",
        reasoning=row.get("reasoning") or "",
        call_id=row.get("call_id") or "",
    )


def messages_from_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tuple(message_from_row(row) for row in rows)


def calls_to_text(calls: Sequence[ToolCall]) -> str:
    """Return calls as a JSON text for a dataset column; "" for none."""
    if not calls:
        return ""
    fields = [{"name": call.name, "arguments": call.arguments, "id": call.id, "source": call.source} for call in calls]
    return json.dumps(fields, ensure_ascii=False)


def message_as_dict(message: Message) -> dict[str, Any]:
    """Return a message as clients send it and templates read it."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        entry["tool_calls"] = [
            {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": parsed_or_text(c.arguments)}}
            for c in message.tool_calls
        ]
    if message.reasoning:
        entry["reasoning_content"] = message.reasoning
    if message.name:
        entry["name"] = message.name
    if message.call_id:
        entry["tool_call_id"] = message.call_id
    return entry
