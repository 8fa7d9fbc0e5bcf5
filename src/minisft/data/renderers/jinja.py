"""Answer spans of any Jinja chat template.

A template is rendered once with sentinels in place of the contents: what stands between them is the template's own
text, and what stands for them is content. The same conversation is then rendered as it is, and both must agree:
a template that drops, trims or rewrites a content is found out and named.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from minisft.data.conversation import Message, message_as_dict
from minisft.data.renderers.base import MarkerSplitter, RefusedError, Rendered, SegmentBuilder
from minisft.data.renderers.jinja_limits import TemplateLimitError, bound_templates
from minisft.data.renderers.templates import with_tools
from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Private-use characters around a slot's number; the next pair where a content uses one itself.
_SENTINELS = (("\ue000", "\ue001"), ("\ue8a0", "\ue8a1"), ("\U000f0000", "\U000f0001"))
_CACHE_SIZE = 4096
_TRIMS = (str, str.strip, str.rstrip, str.lstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"))


@dataclass(frozen=True)
class _Skeleton:
    """A rendering without its contents: steps to build it with them, and what was found.

    A step is ("text", the template's own), ("slot", its number), ("open", message) or ("close", message);
    ("unmarked", message) opens an answer that the template's own marks leave out.
    """

    steps: tuple[tuple[str, Any], ...]
    findings: tuple[str, ...]

    @property
    def literals(self) -> list[str | int]:
        """Texts and slots in order, adjoining texts joined."""
        parts: list[str | int] = []
        for kind, value in self.steps:
            if kind == "slot":
                parts.append(int(value))
            elif kind == "text" and parts and isinstance(parts[-1], str):
                parts[-1] += value
            elif kind == "text":
                parts.append(str(value))
        return parts


class JinjaRenderer:
    """Renders conversations in a Jinja template.

    Args:
        tokenizer: for its special tokens' names, which templates use.
        template: the Jinja text.
        splitter: the control tokens that the template's own text may spell.
        special: the names among them that can end an answer.

    Raises:
        UserError: the template does not parse, or ends no answer with a token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        template: str,
        splitter: MarkerSplitter,
        special: frozenset[str],
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.splitter = splitter
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        bound_templates()
        self._cache: dict[Any, _Skeleton] = {}
        self._structured_calls = "tool_calls" in template
        self._structured_reasoning = "reasoning_content" in template
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._structured_tools = re.search(r"\btools\b", template) is not None
        self._stop_name = self._find_stop()
        self.stop = splitter.controls[self._stop_name].id
        self._generation_prompt = self._find_generation_prompt()

    def __call__(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> Rendered:
        messages, passed, shift = self._with_tools(self._flat(messages), tools)
        slots = _slots(messages)
        skeleton = self._skeleton(messages, passed, prompt)
        text = self._apply([message_as_dict(m) for m in messages], passed, prompt)
        filled = _fit(skeleton.literals, slots, text)
        if filled is None:
            raise self._rewritten(messages, passed, prompt)
        trimmed = any(filled[slot] != slots[slot] for slot in filled)
        findings = [*skeleton.findings, "trimmed"] if trimmed else list(skeleton.findings)
        return self._build(skeleton, filled, messages, findings, shift)

    # --- from skeleton to runs ----------------------------------------------------------------------------

    def _build(
        self,
        skeleton: _Skeleton,
        filled: dict[int, str],
        messages: Sequence[Message],
        findings: list[str],
        shift: int,
    ) -> Rendered:
        builder, open_message, written, unmarked = SegmentBuilder(self.splitter), -1, "", False
        for kind, value in skeleton.steps:
            supervised = open_message >= 0 and messages[open_message].supervised and not unmarked
            if kind in ("open", "unmarked"):
                unmarked = kind == "unmarked"
                builder.open_answer()
                open_message, written = value, ""
            elif kind == "close":
                builder.close_answer(value - shift, written.removesuffix(self._stop_name), supervised)
                open_message = -1
            elif kind == "slot":
                builder.content(filled[value])
                written += filled[value]
            elif open_message >= 0:
                builder.template_in_answer(value, supervised)
                written += value
            else:
                builder.template(value)
        builder.flush()
        return Rendered(builder.segments, builder.answers, findings)

    # --- the skeleton -------------------------------------------------------------------------------------

    def _skeleton(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> _Skeleton:
        marks = _pick_sentinels(messages)
        shape = tuple((m.role, bool(m.content), bool(m.reasoning), m.tool_calls, m.name, m.call_id) for m in messages)
        key = (shape, tuple(tools), prompt, marks)
        known = self._cache.get(key)
        if known is None:
            known = self._make_skeleton(messages, tools, prompt, marks)
            if len(self._cache) < _CACHE_SIZE:
                self._cache[key] = known
        return known

    def _make_skeleton(
        self, messages: Sequence[Message], tools: Sequence[str], prompt: bool, marks: tuple[str, str]
    ) -> _Skeleton:
        dicts = [message_as_dict(_marked(m, i, marks)) for i, m in enumerate(messages)]
        text = self._apply(dicts, tools, prompt)
        spans = _find_slots(text, marks)
        findings = _check_slots(messages, [slot for slot, _, _ in spans])
        cuts: list[tuple[int, int, str, Any]] = [(start, 1, "slot", (slot, end)) for slot, start, end in spans]
        last = max((i for i, m in enumerate(messages) if m.is_answer), default=-1)
        marked = self._marked_spans(dicts, tools) if self._marks_answers and not prompt else None
        for index in [i for i, message in enumerate(messages) if message.is_answer]:
            prefix = self._prefix(dicts[:index], tools)
            own = [(start, end) for slot, start, end in spans if slot // 2 == index]
            if not text.startswith(prefix) or (own and own[0][0] < len(prefix)):
                if index == last:
                    raise RefusedError(
                        "prompt_not_prefix", "the template's prompt for the last answer does not open its training row"
                    )
                findings.append("history_rewritten")
                start = self._start_after_prompt(text, own, spans)
            else:
                start = len(prefix)
            end = self._answer_end(text, own[-1][1] if own else start, spans, messages[index])
            if marked is not None:
                inside = [span for span in marked if span[0] < end and span[1] > start]
                if not inside:
                    findings.append("answer_not_marked")
                    cuts += [(start, 0, "unmarked", index), (end, -1, "close", index)]
                    continue
                start = max(start, inside[0][0])
            cuts += [(start, 0, "open", index), (end, -1, "close", index)]
        return _Skeleton(tuple(_steps(text, sorted(cuts, key=lambda cut: cut[:2]))), tuple(dict.fromkeys(findings)))

    def _marked_spans(self, dicts: list[dict[str, Any]], tools: Sequence[str]) -> list[tuple[int, int]]:
        """The spans that the template itself marks with {% generation %}."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render = cast("Callable[..., tuple[list[str], list[list[tuple[int, int]]]]]", render_jinja_template)
        try:
            _, spans = render(
                [dicts],
                tools=[json.loads(tool) for tool in tools] or None,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateLimitError as limit:
            raise _unbounded(limit) from None
        return spans[0]

    def _prefix(self, dicts: list[dict[str, Any]], tools: Sequence[str]) -> str:
        try:
            return self._apply(dicts, tools, True) if dicts else "\0"
        except RefusedError:
            return "\0"  # no rendering begins so

    def _start_after_prompt(self, text: str, own: list[tuple[int, int]], spans: list[tuple[int, int, int]]) -> int:
        """Where an earlier answer starts although its prompt reads otherwise by now: after its header."""
        if not own:
            raise RefusedError("history_rewritten", "the template removes an earlier answer from the history")
        before = max((end for _, _, end in spans if end <= own[0][0]), default=0)
        place = text.rfind(self._generation_prompt, before, own[0][0]) if self._generation_prompt else -1
        return place + len(self._generation_prompt) if place >= 0 else own[0][0]

    def _answer_end(self, text: str, start: int, spans: list[tuple[int, int, int]], message: Message) -> int:
        limit = min((begin for _, begin, _ in spans if begin >= start), default=len(text))
        place = text.find(self._stop_name, start, limit)
        if place < 0:
            raise RefusedError(
                "no_terminator", f"the template ends the {message.role}'s message without {self._stop_name}"
            )
        return place + len(self._stop_name)

    # --- rendering ----------------------------------------------------------------------------------------

    def _apply(self, dicts: list[dict[str, Any]], tools: Sequence[str], prompt: bool) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    dicts,
                    tools=[json.loads(tool) for tool in tools] or None,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except (TemplateLimitError, RecursionError) as limit:
            raise _unbounded(limit) from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                "data.template", f"line {error.lineno} of the template: {error.message}", "fix the template"
            ) from None
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            raise self._refusal(dicts, tools, prompt, str(error)) from None

    def _refusal(self, dicts: list[dict[str, Any]], tools: Sequence[str], prompt: bool, message: str) -> RefusedError:
        """Name what a template refuses: the role without which it renders, or its own words."""
        for role in ("system", "tool"):
            rest = [entry for entry in dicts if entry["role"] != role]
            if len(rest) < len(dicts) and self._renders(rest, tools, prompt):
                return RefusedError(f"{role}_unsupported", f"the template takes no {role} message ({message})")
        return RefusedError("template_refuses", f"the template refuses the conversation ({message})")

    def _renders(self, dicts: list[dict[str, Any]], tools: Sequence[str], prompt: bool) -> bool:
        try:
            self.tokenizer.apply_chat_template(
                dicts,
                tools=[json.loads(tool) for tool in tools] or None,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception:  # a template can raise anything; here only whether it does matters
            return False
        return True

    def _flat(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Calls as text where the template has no form for them, reasoning apart where it has one."""
        flat = messages
        if not self._structured_calls and any(message.tool_calls for message in messages):
            flat = [replace(m, content=m.text, tool_calls=()) if m.tool_calls else m for m in flat]
        if self._structured_reasoning:
            flat = [_split_reasoning(m) if m.is_answer and "</think>" in m.content else m for m in flat]
        return flat

    def _with_tools(
        self, messages: Sequence[Message], tools: Sequence[str]
    ) -> tuple[Sequence[Message], Sequence[str], int]:
        """Hand tools to a template that takes them; otherwise write them into the system prompt.

        Returns the messages, the tools to hand over and by how many places the messages moved.
        """
        if not tools or self._structured_tools:
            return messages, tools, 0
        if messages and messages[0].role == "system":
            return (Message("system", with_tools(messages[0].content, tools)), *messages[1:]), (), 0
        return (Message("system", with_tools("", tools)), *messages), (), 1

    # --- what the template is -----------------------------------------------------------------------------

    def _find_stop(self) -> str:
        """The token that ends an answer: the first special token after it."""
        open_mark, close_mark = _SENTINELS[0]
        mark = f"{open_mark}2{close_mark}"
        dicts = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": mark}]
        try:
            text = self._apply(dicts, (), False)
        except RefusedError as refusal:
            raise UserError("data.template", refusal.problem, "use another template") from None
        match = self._special.search(text, text.find(mark) + len(mark)) if mark in text else None
        if match is None:
            raise UserError(
                "data.template",
                "the template ends an answer with no special token of this tokenizer, so a model would not stop",
                "use data.template: chatml or mistral, which end answers with the EOS token, or fix the template",
            )
        return match.group()

    def _find_generation_prompt(self) -> str:
        dicts = [{"role": "user", "content": "Hello"}]
        without, within = self._apply(dicts, (), False), self._apply(dicts, (), True)
        return within[len(without) :] if within.startswith(without) else ""

    def _rewritten(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> RefusedError:
        """Name the message whose content, standing for itself, makes the two renderings differ."""
        marks = _pick_sentinels(messages)
        for index, message in enumerate(messages):
            marked = [m if i == index else _marked(m, i, marks) for i, m in enumerate(messages)]
            text = self._apply([message_as_dict(m) for m in marked], tools, prompt)
            if not any(trim(message.content) in text for trim in _TRIMS):
                reason = "thinking_removed" if "</think>" in message.content else "content_rewritten"
                problem = f"the template rewrites the content of message {index + 1} ({message.role})"
                return RefusedError(reason, problem)
        return RefusedError("content_rewritten", "the template rewrites a content")


def _unbounded(limit: Exception) -> UserError:
    reason = "it is nested too deeply" if isinstance(limit, RecursionError) else str(limit)
    problem = f"the template was stopped: {reason}; a template that renders conversations does not"
    return UserError("data.template", problem, "use another template, and do not trust where this one came from")


_THINKING = re.compile(r"\s*<think>\n?(?P<reasoning>.*?)\n?</think>\n*(?P<content>.*)", re.DOTALL)


def _split_reasoning(message: Message) -> Message:
    """Reasoning that a content spells in <think> tags, kept apart."""
    match = _THINKING.fullmatch(message.content)
    if match is None or message.reasoning or not match["reasoning"]:
        return message
    return replace(message, content=match["content"], reasoning=match["reasoning"])


def _slots(messages: Sequence[Message]) -> dict[int, str]:
    """Slot 2i is message i's content, slot 2i + 1 its reasoning."""
    slots = {}
    for index, message in enumerate(messages):
        slots[2 * index] = message.content
        slots[2 * index + 1] = message.reasoning
    return slots


def _marked(message: Message, index: int, marks: tuple[str, str]) -> Message:
    """The message with sentinels in place of its texts; an empty text stays empty, as templates test for it."""
    content = f"{marks[0]}{2 * index}{marks[1]}" if message.content else ""
    reasoning = f"{marks[0]}{2 * index + 1}{marks[1]}" if message.reasoning else ""
    return replace(message, content=content, reasoning=reasoning)


def _pick_sentinels(messages: Sequence[Message]) -> tuple[str, str]:
    for marks in _SENTINELS:
        if not any(marks[0] in m.content or marks[0] in m.reasoning for m in messages):
            return marks
    raise RefusedError("sentinels_spelled", "a content uses all private-use characters that mark contents")


def _find_slots(text: str, marks: tuple[str, str]) -> list[tuple[int, int, int]]:
    """(slot, start, end) of every sentinel in order."""
    pattern = re.compile(f"{marks[0]}(\\d+){marks[1]}")
    return [(int(match[1]), match.start(), match.end()) for match in pattern.finditer(text)]


def _check_slots(messages: Sequence[Message], found: list[int]) -> list[str]:
    """Findings about texts that the template leaves out.

    Raises:
        RefusedError: a content is left out or written twice.
    """
    findings = []
    for index, message in enumerate(messages):
        if message.content and found.count(2 * index) != 1:
            verb = "drops" if 2 * index not in found else "repeats"
            reason = f"{message.role}_{'dropped' if verb == 'drops' else 'repeated'}"
            raise RefusedError(reason, f"the template {verb} the content of message {index + 1} ({message.role})")
        if message.reasoning and 2 * index + 1 not in found:
            findings.append("reasoning_dropped")
    return findings


def _steps(text: str, cuts: list[tuple[int, int, str, Any]]) -> Iterator[tuple[str, Any]]:
    position = 0
    for place, _, kind, value in cuts:
        if place > position:
            yield "text", text[position:place]
            position = place
        if kind == "slot":
            slot, position = value
            yield "slot", slot
        else:
            yield kind, value
    if position < len(text):
        yield "text", text[position:]


def _fit(parts: list[str | int], slots: dict[int, str], text: str) -> dict[int, str] | None:
    """Lay the real rendering over the skeleton: each slot's text as the template wrote it, or None."""
    filled: dict[int, str] = {}
    position = 0
    for number, part in enumerate(parts):
        if isinstance(part, str):
            if not text.startswith(part, position):
                return None
            position += len(part)
            continue
        following = parts[number + 1] if number + 1 < len(parts) else None
        for trim in _TRIMS:
            content = trim(slots[part])
            end = position + len(content)
            fits = end == len(text) if following is None else True
            if isinstance(following, str):
                fits = text.startswith(following, end)
            if fits and text.startswith(content, position):
                break
        else:
            return None
        filled[part] = content
        position = end
    return filled if position == len(text) else None
