"""Conversations in the Mistral forms, as mistral-common renders them: every message is encoded separately."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisft.data.conversation import JOIN, Message, ToolCall, join_same_role_messages, parsed_or_text
from minisft.data.renderers.base import MarkerSplitter, Rendered, SegmentBuilder
from minisft.data.renderers.templates import MistralTemplate, with_tools


@dataclass(frozen=True)
class MistralRenderer:
    """Render a Mistral form as mistral-common does (`tokens/tokenizers/instruct.py`).

    - System prompts: v1 puts them, joined, before the text of the first user turn, v2 and v3 before that of the last.
      From v7 on each is a turn between control tokens.
    - Functions on offer: before the last user turn, and from v13 on before the first.
    - Calls and results: JSON between control tokens; from v7 on a result is plain text, from v11 on a call is its name
      and arguments, and results come in the order of their calls. v13 writes no ids. v2 writes calls and results only
      after the last user turn, so that an earlier call is learned in a row of its own only.
    - From v2 on, an answer loses the spaces at its end.

    A form without control tokens for tools (v1, or a tokenizer that lacks them) writes tools into the system prompt, a
    call as the text of its answer, and a result as a turn of the user; mistral-common refuses such conversations. The
    ledger counts them as `tools_as_text`.

    Args:
        template: The form.
        bos: The id that opens a conversation, or None.
        eos: The id that ends an answer.
        controls: The ids of the control tokens that the form writes, by name.
        assumed: Whether v3 is assumed of a tokenizer that may be of v2, which writes tools in another way.
    """

    template: MistralTemplate
    bos: int | None
    eos: int
    controls: Mapping[str, int]
    assumed: bool = False

    def __call__(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> Rendered:
        version, with_controls = self.template.version, self.template.tools
        # 1. The BOS token.
        builder = SegmentBuilder(_NO_MARKERS)
        if self.bos is not None:
            builder.control(self.bos, False)
        # 2. The system prompts, joined, and the places of what is written once.
        prompts = [message.text for message in messages if message.role == "system" and message.text]
        system = with_tools(JOIN.join(prompts) if version < 7 else "", () if with_controls else tools)
        places, turns = _turns(messages, version)
        users = [i for i, m in enumerate(turns) if m.role == "user"]
        last_user = users[-1] if users else -1
        system_at = last_user if version > 1 else users[0]
        tools_at = last_user if version < 13 or not users else users[0]
        findings = self._findings(messages, tools, bool(users))
        # An earlier answer is served with the system prompt or the tools before it.
        moves = (bool(system) and version > 1) or (bool(tools) and with_controls and version < 13)
        differs = moves and any(turn.is_answer and turn.supervised for turn in turns[: max(last_user, 0)])
        unwritten: list[int] = []
        # 3. The turns.
        for index, (place, message) in enumerate(zip(places, turns, strict=True)):
            if index == tools_at and tools and with_controls:
                self._write(builder, "[AVAILABLE_TOOLS]", available_tools(tools), "[/AVAILABLE_TOOLS]")
            left_out = version == 2 and index < last_user and (message.tool_calls or message.role == "tool")
            if left_out:
                findings.append("earlier_calls_left_out")
                if message.is_answer and message.supervised:
                    unwritten.append(place)
            elif message.is_answer:
                self._answer(builder, place, message, findings)
            elif message.role == "system":
                self._write(builder, "[SYSTEM_PROMPT]", message.text, "[/SYSTEM_PROMPT]")
            elif message.role == "tool" and with_controls:
                self._result(builder, message)
            else:
                text = system + JOIN + message.text if index == system_at and system else message.text
                if version > 1:
                    self._write(builder, "[INST]", text, "[/INST]")
                else:
                    builder.separate()
                    builder.content(f"[INST] {text} [/INST]")
        builder.flush()
        return Rendered(builder.segments, builder.answers, findings, tuple(unwritten), differs)

    def _findings(self, messages: Sequence[Message], tools: Sequence[str], has_user: bool) -> list[str]:
        """Return what the form does not write, and what it writes although mistral-common refuses it."""
        findings = ["reasoning_dropped"] if any(message.reasoning for message in messages) else []
        if not (tools or any(message.tool_calls or message.role == "tool" for message in messages)):
            return findings
        if not self.template.tools:
            return [*findings, "tools_as_text"]
        if self.assumed:
            findings.append("version_assumed")
        if tools and not has_user:
            findings.append("tools_left_out")  # as mistral-common does: there is no turn to write them before
        if self.template.version > 2 and any(message.role == "tool" and not message.call_id for message in messages):
            findings.append("call_id_missing")  # mistral-common refuses it; the result is written without
        if self.template.version < 7 and any(message.tool_calls and message.content for message in messages):
            findings.append("text_before_calls")  # mistral-common refuses it; it is written as from v7 on
        return findings

    def _write(self, builder: SegmentBuilder, opener: str, text: str, closer: str) -> None:
        builder.control(self.controls[opener], False)
        builder.separate()
        builder.content(text)
        builder.control(self.controls[closer], False)

    def _result(self, builder: SegmentBuilder, message: Message) -> None:
        version = self.template.version
        if version in (7, 11):
            builder.control(self.controls["[TOOL_RESULTS]"], False)
            builder.separate()
            builder.content(message.call_id)
            self._write(builder, "[TOOL_CONTENT]", message.text, "[/TOOL_RESULTS]")
        else:
            text = message.text if version == 13 else tool_result(message, version)
            self._write(builder, "[TOOL_RESULTS]", text, "[/TOOL_RESULTS]")

    def _answer(self, builder: SegmentBuilder, index: int, message: Message, findings: list[str]) -> None:
        calls = message.tool_calls if self.template.tools else ()
        text = message.content if calls else message.text
        if self.template.version > 1 and text.endswith(" "):
            findings.append("trimmed")
            text = text.rstrip(" ")
        builder.separate()
        builder.open_answer()
        builder.content(text)
        for control, written in written_calls(calls, self.template.version):
            builder.control(self.controls[control], message.supervised, True)
            builder.separate()
            builder.content(written)
            text += control + (self.template.gap if written else "") + written
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


def written_calls(calls: Sequence[ToolCall], version: int) -> list[tuple[str, str]]:
    """Return the control tokens of calls, each with the text that follows it; a call without an id is written so."""
    written: list[tuple[str, str]] = []
    listed: list[dict[str, Any]] = []
    for call in calls:
        arguments = parsed_or_text(call.arguments or "{}")
        has_id = bool(call.id) and call.id != "null" and version in (3, 7, 11)
        if version < 11:
            entry = {"name": call.name, "arguments": arguments}
            listed.append(entry | {"id": call.id} if has_id else entry)
        else:
            written.append(("[TOOL_CALLS]", call.name))
            written += [("[CALL_ID]", call.id)] if has_id else []
            written.append(("[ARGS]", _json(arguments)))
    return [("[TOOL_CALLS]", _json(listed))] if listed else written


def tool_result(message: Message, version: int) -> str:
    """Return a tool's result as JSON: in v3 with the id of its call where the data has one, in v2 with its name."""
    content = parsed_or_text(message.text or "{}")
    if version == 2:
        return _json([{"name": message.name or None, "content": content}])
    return _json({"content": content, "call_id": message.call_id} if message.call_id else {"content": content})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _turns(messages: Sequence[Message], version: int) -> tuple[list[int], list[Message]]:
    """Return the place in `messages` of each turn, and the turns as mistral-common has them.

    Adjacent messages of one role are joined (the place is that of the last), but not results, nor system prompts,
    which are turns from v7 on. Before v7 an empty user turn comes first where the conversation does not begin with one.
    """
    # 1. Runs of one role.
    runs: list[list[int]] = []
    for place, message in enumerate(messages):
        if runs and messages[runs[-1][-1]].role == message.role and message.role not in ("system", "tool"):
            runs[-1].append(place)
        else:
            runs.append([place])
    places = [run[-1] for run in runs]
    turns = [join_same_role_messages([messages[place] for place in run])[0] for run in runs]
    # 2. From v11 on, results follow the order of the calls before them.
    if version >= 11:
        _sort_results(turns)
    if version >= 7:
        return places, turns
    # 3. The rules before v7.
    kept = [(place, turn) for place, turn in zip(places, turns, strict=True) if turn.role != "system"]
    if not kept or kept[0][1].role != "user":
        kept.insert(0, (-1, Message("user", "")))
    return [place for place, _ in kept], [turn for _, turn in kept]


def _sort_results(turns: list[Message]) -> None:
    """Put each run of results into the order of the calls before it; results of no such call come last."""
    start = 0
    while start < len(turns):
        end = start
        while end < len(turns) and turns[end].role == "tool":
            end += 1
        if end > start + 1:
            calls = [call.id for call in turns[start - 1].tool_calls] if start else []
            turns[start:end] = sorted(
                turns[start:end], key=lambda turn: calls.index(turn.call_id) if turn.call_id in calls else len(calls)
            )
        start = end + 1
