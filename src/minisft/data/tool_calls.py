"""Calls of tools in the text of an answer, in the forms of Hermes and Qwen, of Mistral, and as bare JSON."""

import json
import re
from collections.abc import Sequence

from minisft.data.conversation import ToolCall, parsed_or_text

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_MISTRAL = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(\{.*\})\s*", re.DOTALL)
_ARGUMENTS = frozenset(("arguments", "parameters"))
_NO_CALL = ToolCall("", "")


def find_calls(spelled: str, content: str, tools: frozenset[str] | None) -> tuple[str, tuple[ToolCall, ...]]:
    """Return the text before the calls of an answer, and the calls; none where the answer makes none that is whole.

    Args:
        spelled: The answer, with control tokens spelled out.
        content: The answer as text, without control tokens.
        tools: Names of the functions on offer: a bare JSON object is a call only with one of them. None: they are not
            known, and a bare JSON object is a call if it has a name and arguments.
    """
    # 1. <tool_call>{...}</tool_call>, any number of times.
    if found := _HERMES.findall(spelled):
        calls = [call for text in found for call in _calls_of_json(text)]
        return (content.partition("<tool_call>")[0].strip(), tuple(calls)) if calls else (content, ())
    # 2. [TOOL_CALLS] before a JSON list, or before each NAME[ARGS]{...}.
    before, marker, rest = spelled.partition("[TOOL_CALLS]")
    if marker:
        calls = _calls_of_json(rest)
        if not calls:
            parts = [_MISTRAL.fullmatch(part) for part in rest.split("[TOOL_CALLS]")]
            if not all(parts):
                return content, ()
            calls = [ToolCall(part[1], part[2]) for part in parts if part]
        return before.strip(), tuple(calls)
    # 3. Lines of JSON at the end, as for templates that have no form for calls.
    lines = content.strip().split("\n")
    for place, first in enumerate(lines):
        if not first.lstrip().startswith(("{", "[")):
            continue
        after = lines[place:]
        each = [call for line in after for call in _calls_of_json(line) or [_NO_CALL]]
        calls = _calls_of_json("\n".join(after)) or each
        known = all(call.name in tools for call in calls) if tools is not None else _all_have_arguments(after)
        if known and _NO_CALL not in calls:
            return "\n".join(lines[:place]).strip(), tuple(calls)
    return content, ()


def _calls_of_json(text: str) -> list[ToolCall]:
    value = parsed_or_text(text.strip())
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return []
        arguments = entry.get("arguments", entry.get("parameters", {}))
        spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(entry["name"], spelled))
    return calls


def _all_have_arguments(lines: Sequence[str]) -> bool:
    """Return whether lines of JSON, or the one JSON text that they are, hold nothing but objects with arguments."""
    whole = parsed_or_text("\n".join(lines))
    values = [parsed_or_text(line) for line in lines] if isinstance(whole, str) else [whole]
    entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    return all(isinstance(entry, dict) and not _ARGUMENTS.isdisjoint(entry) for entry in entries)
