"""Conversations in the Mistral forms, as mistral-common renders them: every message is encoded separately."""

import json
from collections.abc import Mapping, Sequence
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
    """Render a Mistral form as mistral-common does (`tokens/tokenizers/instruct.py`).

    The system prompts, joined, go before the first user turn (v1) or into the last (v3). v3 strips spaces from the
    end of answers, and writes tools, calls and results between control tokens. A form without these control tokens
    (v1, or a tokenizer that lacks them) writes tools into the system prompt, a call as the text of its answer, and a
    result as a turn of the user; mistral-common refuses such conversations. The ledger counts them as `tools_as_text`.

    Args:
        template: The form.
        bos: The id that opens a conversation, or None.
        eos: The id that ends an answer.
        controls: The ids of INSTRUCTION by name, and those of TOOLS where the tokenizer has all of these.
    """

    template: MistralTemplate
    bos: int | None
    eos: int
    controls: Mapping[str, int]

    def __call__(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> Rendered:
        # 1. The findings, and the BOS token.
        uses_tools = tools or any(message.tool_calls or message.role == "tool" for message in messages)
        findings = ["reasoning_dropped"] if any(message.reasoning for message in messages) else []
        if not self.template.tools and uses_tools:
            findings.append("tools_as_text")
        elif uses_tools:
            if any(message.role == "tool" and not message.call_id for message in messages):
                findings.append("call_id_missing")  # mistral-common refuses it; the result is written without
            if any(message.tool_calls and message.content for message in messages):
                findings.append("text_before_calls")  # v7 of the template writes text before calls
        builder = SegmentBuilder(_NO_MARKERS)
        if self.bos is not None:
            builder.control(self.bos, False)
        # 2. The system prompts, joined; v3 puts them into the last turn of the user, v1 into the first.
        prompts = [message.text for message in messages if message.role == "system" and message.text]
        system = with_tools(JOIN.join(prompts), () if self.template.tools else tools)
        places, turns = _turns(messages)
        users = [i for i, m in enumerate(turns) if m.role == "user"]
        system_at = users[-1] if self.template.controls else users[0]
        # An earlier answer is served with the system prompt and the tools before it.
        moves = self.template.controls and (system or (tools and self.template.tools))
        differs = bool(moves) and any(turn.is_answer and turn.supervised for turn in turns[:system_at])
        # 3. The turns.
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
                if self.template.controls:
                    self._between(builder, "INST", text)
                else:
                    builder.separate()
                    builder.content(f"[INST] {text} [/INST]")
        builder.flush()
        return Rendered(builder.segments, builder.answers, findings, prompt_differs=differs)

    def _between(self, builder: SegmentBuilder, name: str, text: str) -> None:
        builder.control(self.controls[f"[{name}]"], False)
        builder.separate()
        builder.content(text)
        builder.control(self.controls[f"[/{name}]"], False)

    def _answer(self, builder: SegmentBuilder, index: int, message: Message, findings: list[str]) -> None:
        calls = message.tool_calls if self.template.tools else ()
        text = message.content if calls else message.text
        if self.template.controls and text.endswith(" "):
            findings.append("trimmed")
            text = text.rstrip(" ")
        builder.separate()
        builder.open_answer()
        builder.content(text)
        if calls:
            builder.control(self.controls["[TOOL_CALLS]"], message.supervised, True)
            builder.separate()
            builder.content(written_calls(calls))
            text += "[TOOL_CALLS]" + self.template.gap + written_calls(calls)
        builder.control(self.eos, message.supervised, True)
        builder.close_answer(index, text, message.supervised)


_NO_MARKERS = MarkerSplitter({})


def available_tools(tools: Sequence[str]) -> str:
    """Return the functions on offer, one JSON text each, as one list in mistral-common's form.

    A function may be bare or wrapped; mistral-common's keys come first, and other keys after them.
    """
    listed: list[Any] = []
    for tool in map(json.loads, tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            listed.append(tool)
            continue
        first = {
            "name": function.get("name"),
            "description": function.get("description") or "",
            "parameters": function.get("parameters") or {},
        }
        others = {key: value for key, value in function.items() if key not in (*first, "strict", "type")}
        listed.append({"type": "function", "function": first | others})
    return _json(listed)


def written_calls(calls: Sequence[ToolCall]) -> str:
    """Return calls as one JSON list; a call without an id has no key for it."""
    listed = []
    for call in calls:
        written = {"name": call.name, "arguments": parsed_or_text(call.arguments or "{}")}
        listed.append(written | {"id": call.id} if call.id and call.id != "null" else written)
    return _json(listed)


def tool_result(message: Message) -> str:
    """Return a tool's result as JSON, with the id of the call that it answers where the data has one."""
    written = {"content": parsed_or_text(message.text or "{}")}
    return _json(written | {"call_id": message.call_id} if message.call_id else written)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _turns(messages: Sequence[Message]) -> tuple[list[int], list[Message]]:
    """Return the place in `messages` of each turn, and the turns as mistral-common has them: without system prompts.

    Adjacent messages of one role are joined (the place is that of the last), and an empty user turn is put first where
    the conversation does not begin with one.
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
