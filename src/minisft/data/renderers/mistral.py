"""Conversations in the Mistral forms, as mistral-common renders them: every message encoded on its own."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minisft.data.conversation import JOIN, Message, ToolCall, join_same_role_messages, parsed_or_text
from minisft.data.renderers.base import MarkerSplitter, Rendered, SegmentBuilder
from minisft.data.renderers.templates import MistralTemplate, with_tools

INSTRUCTION = ("[INST]", "[/INST]")
TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")


@dataclass(frozen=True)
class MistralRenderer:
    """Renders a Mistral form as mistral-common does (`tokens/tokenizers/instruct.py`).

    The system prompts, joined, go before the first user turn (v1) or into the last (v3). v3 strips spaces from the
    end of answers, and writes tools, calls and results between control tokens. Where the form has none for them (v1,
    or a tokenizer without these tokens), tools stand in the system prompt, a call is its answer's text and a result a
    turn of the user's; mistral-common refuses such conversations. That is counted as `tools_as_text`.

    Args:
        template: the form.
        bos: the id that opens a conversation, or None.
        eos: the id that ends an answer.
        controls: the ids of INSTRUCTION, and of TOOLS where the tokenizer has all of these, by name.
    """

    template: MistralTemplate
    bos: int | None
    eos: int
    controls: Mapping[str, int]

    def __call__(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> Rendered:
        findings = self._findings(messages, tools)
        builder = SegmentBuilder(_NO_MARKERS)
        if self.bos is not None:
            builder.control(self.bos, False)
        system = _joined_system(messages, () if self.template.tools else tools)
        places, turns = _turns(messages)
        system_at = self._system_place([i for i, m in enumerate(turns) if m.role == "user"])
        for index, (place, message) in enumerate(zip(places, turns, strict=True)):
            if index == system_at and tools and self.template.tools:
                self._between(builder, "AVAILABLE_TOOLS", available_tools(tools))
            if message.is_answer:
                self._answer(builder, place, message, findings)
            elif message.role == "tool" and self.template.tools:
                self._between(builder, "TOOL_RESULTS", tool_result(message))
            else:
                text = message.text
                if index == system_at and system:
                    text = system + JOIN + text
                self._user(builder, text)
        builder.flush()
        return Rendered(builder.segments, builder.answers, findings)

    def _findings(self, messages: Sequence[Message], tools: Sequence[str]) -> list[str]:
        findings = ["reasoning_dropped"] if any(message.reasoning for message in messages) else []
        if not self.template.tools:
            written = tools or any(message.tool_calls or message.role == "tool" for message in messages)
            return [*findings, "tools_as_text"] if written else findings
        if any(message.role == "tool" and not message.call_id for message in messages):
            findings.append("call_id_missing")  # mistral-common refuses it; the result is written without
        if any(message.tool_calls and message.content for message in messages):
            findings.append("text_before_calls")  # v7 of the template writes text before calls
        return findings

    def _system_place(self, users: Sequence[int]) -> int:
        return users[-1] if self.template.controls else users[0]

    def _user(self, builder: SegmentBuilder, text: str) -> None:
        if self.template.controls:
            self._between(builder, "INST", text)
        else:
            builder.apart()
            builder.content(f"[INST] {text} [/INST]")

    def _between(self, builder: SegmentBuilder, name: str, text: str) -> None:
        builder.control(self.controls[f"[{name}]"], False)
        builder.apart()
        builder.content(text)
        builder.control(self.controls[f"[/{name}]"], False)

    def _answer(self, builder: SegmentBuilder, index: int, message: Message, findings: list[str]) -> None:
        calls = message.tool_calls if self.template.tools else ()
        text = message.content if calls else message.text
        if self.template.controls and text.endswith(" "):
            findings.append("trimmed")
            text = text.rstrip(" ")
        builder.apart()
        builder.open_answer()
        builder.content(text)
        if calls:
            builder.control(self.controls["[TOOL_CALLS]"], message.supervised, True)
            builder.apart()
            builder.content(written_calls(calls))
            text += "[TOOL_CALLS]" + self.template.gap + written_calls(calls)
        builder.control(self.eos, message.supervised, True)
        builder.close_answer(index, text, message.supervised)


_NO_MARKERS = MarkerSplitter({})


def available_tools(tools: Sequence[str]) -> str:
    """The functions on offer, one JSON text each, as one list in mistral-common's form."""
    return _json([_as_tool(json.loads(tool)) for tool in tools])


def _as_tool(tool: Any) -> Any:
    """A function on offer, bare or wrapped, with mistral-common's keys first; keys of its own are kept behind."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        return tool
    first = {
        "name": function.get("name"),
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or {},
    }
    others = {key: value for key, value in function.items() if key not in (*first, "strict", "type")}
    return {"type": "function", "function": first | others}


def written_calls(calls: Sequence[ToolCall]) -> str:
    """Calls as one JSON list; an id only where there is one."""
    return _json([_as_call(call) for call in calls])


def _as_call(call: ToolCall) -> dict[str, Any]:
    written = {"name": call.name, "arguments": parsed_or_text(call.arguments or "{}")}
    return written | {"id": call.id} if call.id and call.id != "null" else written


def tool_result(message: Message) -> str:
    """A tool's result as JSON, with the id of the call that it answers where there is one."""
    written = {"content": parsed_or_text(message.text or "{}")}
    return _json(written | {"call_id": message.call_id} if message.call_id else written)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _joined_system(messages: Iterable[Message], tools: Sequence[str]) -> str:
    prompts = [message.text for message in messages if message.role == "system" and message.text]
    return with_tools(JOIN.join(prompts), tools)


def _turns(messages: Sequence[Message]) -> tuple[list[int], list[Message]]:
    """The turns without system prompts as mistral-common has them, and each one's place in `messages`.

    Same-role runs are joined (the place is the last one's), and an empty user turn stands first where none does.
    """
    places = [i for i, message in enumerate(messages) if message.role != "system"]
    turns = [messages[i] for i in places]
    if any(a.role == b.role != "tool" for a, b in pairwise(turns)):
        last_of_run = [a.role != b.role or a.role == "tool" for a, b in pairwise(turns)] + [True]
        places = [place for place, is_last in zip(places, last_of_run, strict=True) if is_last]
        turns = join_same_role_messages(turns)
    if not turns or turns[0].role != "user":
        return [-1, *places], [Message("user", ""), *turns]
    return places, turns
