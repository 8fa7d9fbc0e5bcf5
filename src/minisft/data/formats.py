"""ShareGPT, messages, Alpaca and prompt-completion rows to conversations, or an error that names the fault of a row."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from minisft.data.conversation import Conversation, Message, ToolCall, join_same_role_messages
from minisft.data.readers import DUPLICATE, CellsError, RowTooLargeError

FORMATS = ("sharegpt", "messages", "alpaca", "prompt_completion")
_ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("human", "user"),
    "assistant": ("gpt", "chatgpt", "assistant", "bing", "bard", "model", "bot"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
    "call": ("function_call", "tool_call"),
}
_ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
_TRAIN_FLAGS = ("weight", "train", "loss", "trainable")
_OFF = ("", "0", "0.0", "false", "no")  # flags that are text; data sets also write true, 1 and 1.0
REPAIRS = ("characters_replaced", "leading_answers_trimmed", "unanswered_end_trimmed", "same_role_joined")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MEDIA_KEYS = frozenset(("image", "images", "audio", "audios", "video", "videos"))
# The keys that are read from a row and from a turn; from several keys in one tuple, the first that is present.
_ROW_KEYS = {
    "sharegpt": (("conversations", "conversation"),),
    "messages": (("messages",),),
    "alpaca": (("instruction",), ("input",), ("output", "response"), ("history",)),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "turn": (("from", "role"), ("value", "content"), ("name",), ("tool_calls",), ("tool_call_id",),
             *((key,) for key in (*_TRAIN_FLAGS, *_REASONING_KEYS))),
}  # fmt: skip
_COMMON_KEYS = ("id", "system", "tools", *_MEDIA_KEYS)  # read from every row; media are refused


class RowError(Exception):
    """A row is not a conversation that can be trained on.

    Args:
        reason: The name under which the ledger counts it.
        problem: What is wrong, for people.
        fix: How to fix it.
    """

    def __init__(self, reason: str, problem: str, fix: str) -> None:
        self.reason, self.problem, self.fix = reason, problem, fix
        super().__init__(reason, problem, fix)


def detect_format(row: Any) -> str | None:
    """Return the format of a row by its keys, or None."""
    if not isinstance(row, Mapping):
        return None
    if "conversations" in row or "conversation" in row:
        return "sharegpt"
    if "messages" in row:
        return "messages"
    if "instruction" in row and ("output" in row or "response" in row):
        return "alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "prompt_completion"
    return None


def to_conversation(row: Any, location: str, format: str) -> Conversation:
    """Return the conversation of a row, in whatever order its turns are (see `check_order`).

    Raises:
        RowError: The row does not have the keys and types of its format.
    """
    # 1. Refuse what is not one JSON object of text.
    if isinstance(row, ValueError):
        raise not_json_error(row)
    if not isinstance(row, Mapping):
        problem = f"the row is {_kind(row)}, not an object"
        raise RowError("not_an_object", problem, "write an object with the conversation")
    _refuse_duplicates(row)
    if not _MEDIA_KEYS.isdisjoint(row):
        _refuse_media(row, "the row")
    # 2. The turns.
    if format == "alpaca":
        messages = _read_alpaca(row)
    elif format == "prompt_completion":
        messages = _read_prompt_completion(row)
    else:
        key = "messages" if format == "messages" else "conversations"
        if key == "conversations" and key not in row and "conversation" in row:
            key = "conversation"
        messages = _turn_list(_required(row, key), key)
    # 3. The system prompt, which may have a column. It may be the first turn as well.
    if row.get("system") is not None and (system := _text(row["system"], "the system column")):
        repeats = bool(messages) and messages[0].role == "system" and messages[0].content == system
        messages = messages if repeats else [Message("system", system), *messages]
    if not messages:
        raise RowError("empty_conversation", "the conversation has no turns", "give it a question and an answer")
    # 4. The id, and the functions on offer as a JSON list.
    identity = row.get("id")
    name = location if identity is None or isinstance(identity, Mapping | list) else str(identity)
    name, tools, tools_text = _clean(name, "the id"), row.get("tools"), ""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise RowError("bad_tools", "'tools' is a text that is not JSON", "write a JSON list of tools") from None
    if _holds(tools):
        if not isinstance(tools, list | dict):
            raise RowError("bad_tools", f"'tools' is {_kind(tools)}, not a list", "write a JSON list of tools")
        tools_text = json.dumps(tools if isinstance(tools, list) else [tools], ensure_ascii=False)
    return Conversation(tuple(messages), name, location, _clean(tools_text, "tools"))


def row_too_large_error() -> RowError:
    """Return the error for a row with more than `LARGEST_ROW` bytes or characters."""
    return RowError(
        "too_large", f"the row is too large: {RowTooLargeError()}", "split the conversation into several rows"
    )


def not_json_error(error: ValueError) -> RowError:
    """Return what is wrong with a row that is not JSON or is too large to be read."""
    if isinstance(error, RowTooLargeError):
        return row_too_large_error()
    if isinstance(error, CellsError):
        problem = f"the row has {error.cells} cells, and the header names {error.columns} columns"
        return RowError("too_many_cells", problem, 'put a text with a comma or a line break in it into "double quotes"')
    if isinstance(error, UnicodeDecodeError):
        return RowError("wrong_encoding", f"not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8")
    return RowError("not_json", f"not JSON: {error}", "fix the line; a JSON checker shows the position")


def ignored_columns(row: Any, format: str) -> set[str]:
    """Return the names of non-empty columns that are not read; keys of turns are named "turns.NAME"."""
    if not isinstance(row, Mapping):
        return set()
    ignored = {name for name in _unread(format, tuple(row)) if _holds(row[name])}
    for names in _ROW_KEYS[format] if format != "alpaca" else ():
        turns = next((row[name] for name in names if name in row), None)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping) and len(turn) > 2:
                ignored.update(f"turns.{name}" for name in _unread("turn", tuple(turn)) if _holds(turn[name]))
    return ignored


@lru_cache(1024)
def _unread(kind: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    read = {next((name for name in names if name in keys), "") for names in _ROW_KEYS[kind]}
    read |= {DUPLICATE, *_MEDIA_KEYS} if kind == "turn" else {DUPLICATE, *_COMMON_KEYS}
    return tuple(key for key in keys if key not in read)


def _holds(value: Any) -> bool:
    """Return whether a value is neither null nor empty."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


# --- the formats ------------------------------------------------------------------------------------------


def _read_alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for pair in _listed(row.get("history"), "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("content_not_text", "history is not a list of pairs", "write [[question, answer], ...]")
        messages += [Message("user", _text(pair[0], "history")), Message("assistant", _text(pair[1], "history"))]
    instruction = _text(_required(row, "instruction"), "instruction")
    extra = row.get("input")
    if extra is not None and extra != "":
        instruction = f"{instruction}\n{_text(extra, 'input')}" if instruction else _text(extra, "input")
    answer = _required(row, "output" if "output" in row else "response")
    return [*messages, Message("user", instruction), Message("assistant", _text(answer, "output"))]


def _read_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    prompt = _required(row, "prompt")
    completion = _required(row, "completion" if "completion" in row else "response")
    before = _turn_list(prompt, "prompt") if isinstance(prompt, list) else [Message("user", _text(prompt, "prompt"))]
    if isinstance(completion, list):
        after = _turn_list(completion, "completion")
    else:
        after = [Message("assistant", _text(completion, "completion"))]
    return [*(replace(m, supervised=False) for m in before), *after]


def _turn_list(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise RowError("content_not_text", f"{key!r} is {_kind(turns)}, not a list", "write a list of turns")
    return [_message(turn, number) for number, turn in enumerate(turns, 1)]


def _message(turn: Any, number: int) -> Message:
    # 1. The speaker.
    if not isinstance(turn, Mapping):
        problem = f"turn {number} is {_kind(turn)}, not an object"
        raise RowError("content_not_text", problem, "write {from, value} objects")
    if DUPLICATE in turn:
        _refuse_duplicates(turn)
    name = turn.get("from", turn.get("role"))
    if name is None:
        raise RowError("missing_keys", f"turn {number} has no 'from' or 'role'", "name the role of the speaker")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise RowError("unknown_role", f"turn {number} has the unknown role {name!r}", f"use one of {known}")
    # 2. The text. Most turns have nothing else, and return here.
    if "value" not in turn and "content" not in turn and not turn.get("tool_calls"):
        raise RowError("missing_keys", f"turn {number} has no 'value' or 'content'", "give it a text")
    content = turn.get("value", turn.get("content"))
    where = f"turn {number}"
    if len(turn) == 2 and role != "call" and type(content) is str:
        return Message(role, _clean(content, where))
    # 3. Calls. A turn of the role "call" spells one as its text.
    if not _MEDIA_KEYS.isdisjoint(turn):
        _refuse_media(turn, where)
    calls = tuple(_call(call, where) for call in _listed(turn.get("tool_calls"), f"{where}'s tool_calls"))
    if content is None and calls:
        content = ""
    text = _text(content, where)
    if role == "call":
        spelled = _call_of_text(text)
        role, text, calls = "assistant", "" if spelled else text, spelled or calls
    # 4. The remaining keys.
    flags = [turn[flag] for flag in _TRAIN_FLAGS if turn.get(flag) is not None]
    reasoning_key = next((key for key in _REASONING_KEYS if _holds(turn.get(key))), None)
    return Message(
        role,
        text,
        supervised=all(flag.strip().lower() not in _OFF if isinstance(flag, str) else flag for flag in flags),
        tool_calls=calls,
        name=_word(turn.get("name"), f"{where}'s name"),
        reasoning="" if reasoning_key is None else _text(turn[reasoning_key], f"{where}'s {reasoning_key}"),
        call_id=_word(turn.get("tool_call_id"), f"{where}'s tool_call_id"),
    )


def _call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(
            "bad_tool_call", f"{where} has a call without a function's name", "write {function: {name, ...}}"
        )
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    identity = _word(call.get("id"), f"{where}'s call's id")
    return ToolCall(_clean(function["name"], where), _clean(arguments, where), identity)


def _call_of_text(text: str) -> tuple[ToolCall, ...]:
    """Return the call that a function_call turn spells as JSON, or none. The text is kept as the call's source."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str) or set(parsed) > {"name", "arguments"}:
        return ()
    arguments = parsed.get("arguments", {})
    as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not _is_utf8(parsed["name"] + as_text):  # the text spells half a character as an escape
        return ()
    return (ToolCall(parsed["name"], as_text, source=text),)


# --- values -----------------------------------------------------------------------------------------------


def _required(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        keys = ", ".join(map(str, list(row)[:8])) or "none"
        raise RowError("missing_keys", f"there is no key {key!r} (keys: {keys})", f"give the row {key!r}")
    if row[key] is None:
        raise RowError("null_content", f"{key!r} is null", "give it a value or remove the row")
    return row[key]


def _listed(value: Any, where: str) -> list[Any]:
    """Return a value that must be a list; null is an empty list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError("content_not_text", f"{where} is {_kind(value)}, not a list", "write a list")
    return value


def _text(value: Any, where: str) -> str:
    """Return a content as text: a string, or text parts joined.

    Raises:
        RowError: The content is neither.
    """
    if isinstance(value, str):
        return _clean(value, where)
    if value is None:
        raise RowError("null_content", f"{where} has the content null", "give it a text or remove the row")
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text"), where) for part in value)
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in value
    ):
        kind = next(part["type"] for part in value if part["type"] != "text")
        raise _media_error(f"{where} has a content part of type {kind[:40]!r}")
    problem = f"{where} has a content that is {_kind(value)}, not text"
    raise RowError("content_not_text", problem, "give it a string (or a list of text parts)")


def _word(value: Any, where: str) -> str:
    """Return a name or an identifier as text, "" for none; some data sets write numbers."""
    if value is None:
        return ""
    return _text(str(value) if type(value) is int else value, where)


def _refuse_media(entry: Mapping[str, Any], where: str) -> None:
    for key in _MEDIA_KEYS & entry.keys():
        if _holds(entry[key]):
            raise _media_error(f"{where} has {key!r}")


def _media_error(problem: str) -> RowError:
    fix = "remove the row (invalid: skip does), or the column where the texts can be understood without it"
    return RowError("media_unsupported", f"{problem}, and only text is trained on", fix)


def _clean(text: str, where: str) -> str:
    if "\0" in text:
        raise RowError("nul_character", f"{where} holds a NUL character", "remove it (invalid: repair does)")
    if not _is_utf8(text):
        fix = "write the complete character (invalid: repair puts U+FFFD)"
        raise RowError("lone_surrogate", f"{where} holds half a character (a lone surrogate)", fix)
    return text


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_duplicates(row: Mapping[str, Any]) -> None:
    if DUPLICATE in row:
        raise RowError("duplicate_key", f"the key {row[DUPLICATE]!r} is given twice", "keep one of them")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# --- order ------------------------------------------------------------------------------------------------

_FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_order(messages: Sequence[Message]) -> None:
    """Check that the turns are a conversation from a user's question to an answer.

    Raises:
        RowError: They are not. The error names the first fault.
    """
    previous = ""
    for number, message in enumerate(messages, 1):
        if message.role not in _FOLLOWERS[previous]:
            if message.role == previous:
                fix = "join the two or add what is missing between them (invalid: repair joins them)"
                raise RowError("same_role_twice", f"turn {number} is the {previous}'s again", fix)
            if message.role == "system":
                fix = "put the system prompt first"
                raise RowError("system_not_first", f"turn {number} is a system prompt", fix)
            if previous in ("", "system"):
                fix = "begin with the user's turn (invalid: repair trims what is before it)"
                raise RowError("starts_without_user", f"it starts with the {message.role}'s turn", fix)
            problem = f"turn {number} is the {message.role}'s after the {previous}'s"
            raise RowError("out_of_order", problem, "add what is missing")
        if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
            raise RowError("empty_answer", f"turn {number} is an empty answer", "give the answer or remove the row")
        previous = message.role
    if previous != "assistant":
        raise RowError(
            "unanswered_end", f"it ends with the {previous}'s turn", "add the answer or remove that turn (repair does)"
        )
    if not any(message.is_answer and message.supervised for message in messages):
        problem = "none of its answers is trained on: weight, train, loss or trainable is 0 or false on each"
        raise RowError("nothing_supervised", problem, "set it to 1 on one answer, or remove the key")


def repair(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Join messages of the same role, and trim leading answers (system prompts among them stay) and unanswered ends.

    Returns:
        The messages and the names of the repairs. `check_order` decides whether the messages are in order now.
    """
    done: dict[str, None] = {}
    kept = list(messages)
    first = next((i for i, m in enumerate(kept) if m.role == "user"), len(kept))
    system = [m for m in kept[:first] if m.role == "system"]
    if first > len(system):
        kept, done["leading_answers_trimmed"] = system + kept[first:], None
    full = (i for i, m in enumerate(kept) if m.is_answer and (m.content.strip() or m.tool_calls))
    last = max(full, default=-1)
    if last + 1 < len(kept):
        kept, done["unanswered_end_trimmed"] = kept[: last + 1], None
    joined = join_same_role_messages(kept)
    if len(joined) < len(kept):
        done["same_role_joined"] = None
    return tuple(joined), tuple(done)


def repair_characters(value: Any) -> Any:
    """Return a row without NUL characters and with U+FFFD for lone surrogates."""
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, list):
        return [repair_characters(item) for item in value]
    if isinstance(value, dict):
        return {key: repair_characters(item) for key, item in value.items()}
    return value
