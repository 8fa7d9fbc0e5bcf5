"""Find the answers in the rendering of any Jinja chat template.

A template is rendered once with sentinels in place of the contents: the text between the sentinels is the template's
own. The conversation is then rendered with its contents, and both renderings must agree: a template that drops, trims
or rewrites a content is detected, and the message names that content.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from minisft.data.conversation import Message, ToolCall
from minisft.data.renderers.base import MarkerSplitter, RefusedError, Rendered, SegmentBuilder
from minisft.data.renderers.jinja_limits import TemplateLimitError, bound_templates
from minisft.data.renderers.reasoning import REASONING_KEYS, AnswerForm, message_with_key, separate_reasoning
from minisft.data.renderers.templates import with_tools
from minisft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Private-use characters around a slot's number; the next pair where a content uses one itself.
_SENTINELS = (("\ue000", "\ue001"), ("\ue8a0", "\ue8a1"), ("\U000f0000", "\U000f0001"))
_CACHE_SIZE = 4096
_A_TOOL = '{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}'
_TRIMS = (str, str.strip, str.rstrip, str.lstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"))


@dataclass(frozen=True)
class _Skeleton:
    """A rendering without its contents: the steps that build it with them, and findings about the template.

    A step is ("text", the template's own), ("slot", its number), ("open", message) or ("close", message);
    ("unmarked", message) opens an answer that the template's own marks leave out. `rewritten` are the messages whose
    answers the template writes otherwise as the last message, and `moved` those behind another prompt than that of
    inference.
    """

    steps: tuple[tuple[str, Any], ...]
    findings: tuple[str, ...]
    rewritten: frozenset[int]
    moved: frozenset[int]

    @property
    def literals(self) -> list[str | int]:
        """Return texts and slots in order, with adjacent texts joined."""
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
        tokenizer: The tokenizer, whose special tokens' names templates use.
        template: The Jinja text.
        splitter: The control tokens that the template's own text may spell.
        special: The names of those tokens that can end an answer.

    Attributes:
        stops: Ids of the tokens that end an answer; the second, where there is one, ends an answer that makes calls.
        reads_reasoning: Whether the template has a key for reasoning.
        form: What the template writes around the reasoning of an answer; None if it writes none there.

    Raises:
        UserError: The template does not parse, or does not end an answer with a token.
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
        self._served: dict[Any, str | None] = {}
        self._structured_calls = "tool_calls" in template
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._structured_tools = re.search(r"\btools\b", template) is not None
        # 1. The token that ends an answer is the first special token after it.
        self._reasoning_as = REASONING_KEYS[0]
        open_mark, close_mark = _SENTINELS[0]
        mark = f"{open_mark}2{close_mark}"
        question = Message("user", "Hello")
        try:
            text = self._render([question, Message("assistant", mark)], (), False)
        except RefusedError as refusal:
            raise UserError("data.template", refusal.problem, "use another template") from None
        match = self._special.search(text, text.find(mark) + len(mark)) if mark in text else None
        if match is None:
            raise UserError(
                "data.template",
                "the template does not end an answer with a special token of this tokenizer, so a model would not stop",
                "use data.template: chatml or mistral, which end answers with the EOS token, or fix the template",
            )
        self._stop_names = [match.group(), *self._end_of_calls(question, match.group())]
        self.stops = tuple(splitter.controls[name].id for name in self._stop_names)
        # 2. The generation prompt is the text that a rendering for inference adds.
        without, within = self._render([question], (), False), self._render([question], (), True)
        self._generation_prompt = within[len(without) :] if within.startswith(without) else ""
        # 3. The form of the reasoning.
        self.reads_reasoning = "reasoning_content" in template
        self.form = self._find_form(question, within)

    def _end_of_calls(self, question: Message, stop: str) -> list[str]:
        """Return the special token that ends an answer with calls, where it is another than `stop`."""
        if not self._structured_calls:
            return []
        call = Message("assistant", "", tool_calls=(ToolCall("f", "{}", "abcdefghi"),))
        try:
            text = self._render([question, call], (_A_TOOL,), False).rstrip()
        except RefusedError:
            return []
        last = [match for match in self._special.finditer(text) if match.end() == len(text)]
        return [match.group() for match in last if match.group() != stop and stop not in text]

    def _find_form(self, question: Message, prompt: str) -> AnswerForm | None:
        """Find out under which key the template reads reasoning, and what it writes around it."""
        content, reasoning = (f"{_SENTINELS[0][0]}{slot}{_SENTINELS[0][1]}" for slot in (2, 3))
        for key in REASONING_KEYS:
            if not re.search(rf"\b{key}\b", self.template):
                continue
            self._reasoning_as = key
            try:
                text = self._render([question, Message("assistant", content, reasoning=reasoning)], (), False)
                plain = self._render([question, Message("assistant", content)], (), False)
            except RefusedError:
                continue
            if not 0 <= text.find(reasoning) < text.find(content) or "'type': 'thinking'" in text:
                continue
            self.reads_reasoning = True
            if not text.startswith(prompt) or not plain.startswith(prompt):
                return None  # the prompt contradicts reasoning, as where a template's thinking is switched off
            opening, _, rest = text[len(prompt) :].partition(reasoning)
            closing = rest.partition(content)[0]
            return AnswerForm(opening, closing, plain[len(prompt) :].partition(content)[0]) if closing.strip() else None
        self._reasoning_as = REASONING_KEYS[0]
        return None

    def __call__(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> Rendered:
        # 1. Write calls, reasoning and tools in the form that the template takes.
        messages, passed, shift = self._adapt(messages, tools)
        # 2. Render with sentinels in place of the texts. Conversations of one shape share this rendering.
        marks = _pick_sentinels(messages)
        key = (_shape(messages), tuple(passed), prompt, marks)
        skeleton = self._cache.get(key)
        if skeleton is None:
            skeleton = self._make_skeleton(messages, passed, prompt, marks)
            if len(self._cache) < _CACHE_SIZE:
                self._cache[key] = skeleton
        # 3. Render with the texts, and compare. Slot 2i is the content of message i, slot 2i + 1 its reasoning.
        text = self._render(messages, passed, prompt)
        slots = dict(enumerate(chain.from_iterable((m.content, m.reasoning) for m in messages)))
        filled = _fit(skeleton.literals, slots, text)
        if filled is None:
            raise self._rewritten(messages, passed, prompt)
        trimmed = any(filled[slot] != slots[slot] for slot in filled)
        findings = [*skeleton.findings, "trimmed"] if trimmed else list(skeleton.findings)
        # 4. Build the segments.
        rewritten = skeleton.rewritten
        if not prompt:
            rewritten |= self._trimmed_otherwise(skeleton, filled, messages, passed)
        rendered = self._build(skeleton, filled, messages, rewritten, shift)
        rendered.findings = findings
        rendered.left_out = tuple(index - shift for index in sorted(rewritten) if messages[index].supervised)
        rendered.prompt_differs = any(messages[index].supervised for index in skeleton.moved - rewritten)
        return rendered

    def _adapt(self, messages: Sequence[Message], tools: Sequence[str]) -> tuple[Sequence[Message], Sequence[str], int]:
        """Write calls, reasoning and tools in the form that the template takes.

        Calls become text where the template has no form for them. Reasoning in <think> tags is separated from the
        content where the template has a key for it. Tools go into the system prompt where the template takes none.

        Returns:
            The messages, the tools to pass to the template, and by how many places the messages moved.
        """
        if not self._structured_calls and any(message.tool_calls for message in messages):
            messages = [replace(m, content=m.text, tool_calls=()) if m.tool_calls else m for m in messages]
        if self.reads_reasoning:
            messages = [separate_reasoning(message) for message in messages]
        if not tools or self._structured_tools:
            return messages, tools, 0
        if messages and messages[0].role == "system":
            return (Message("system", with_tools(messages[0].content, tools)), *messages[1:]), (), 0
        return (Message("system", with_tools("", tools)), *messages), (), 1

    # --- from skeleton to segments --------------------------------------------------------------------------

    def _build(
        self,
        skeleton: _Skeleton,
        filled: dict[int, str],
        messages: Sequence[Message],
        rewritten: frozenset[int],
        shift: int,
    ) -> Rendered:
        builder, open_message, written, unmarked = SegmentBuilder(self.splitter), -1, "", False
        for kind, value in skeleton.steps:
            supervised = (
                open_message >= 0
                and messages[open_message].supervised
                and open_message not in rewritten
                and not unmarked
            )
            if kind in ("open", "unmarked"):
                unmarked = kind == "unmarked"
                builder.open_answer()
                open_message, written = value, ""
            elif kind == "close":
                for name in self._stop_names:
                    written = written.removesuffix(name)
                builder.close_answer(value - shift, written, supervised)
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
        return Rendered(builder.segments, builder.answers, [])

    def _trimmed_otherwise(
        self, skeleton: _Skeleton, filled: dict[int, str], messages: Sequence[Message], tools: Sequence[str]
    ) -> frozenset[int]:
        """Return the earlier answers whose outer white space the template treats otherwise in the last message."""
        found, answer = set(), ""
        for kind, value in skeleton.steps:
            if kind in ("open", "unmarked"):
                answer = ""
            elif kind != "close":
                answer += filled[value] if kind == "slot" else value
            elif value < len(messages) - 1 and _has_outer_space(messages[value]):
                try:
                    prompt = self._render(messages[:value], tools, True)
                    served = self._render(messages[: value + 1], tools, False)
                except RefusedError:
                    served, prompt = "", "\0"
                if not (served.startswith(prompt) and served.startswith(answer, len(prompt))):
                    found.add(value)
        return frozenset(found)

    # --- the skeleton -------------------------------------------------------------------------------------

    def _make_skeleton(
        self, messages: Sequence[Message], tools: Sequence[str], prompt: bool, marks: tuple[str, str]
    ) -> _Skeleton:
        # 1. Render with sentinels, and find each: (slot, start, end).
        last = -1 if prompt else len(messages) - 1
        marked_messages = [_marked(m, i, marks) for i, m in enumerate(messages)]
        text = self._render(marked_messages, tools, prompt)
        spans = _slot_spans(text, marks)
        _check_slots(messages, [slot for slot, _, _ in spans], last)
        findings, rewritten, moved = [], set(), set()
        cuts: list[tuple[int, int, str, Any]] = [(start, 1, "slot", (slot, end)) for slot, start, end in spans]
        dicts = [message_with_key(message, self._reasoning_as) for message in marked_messages]
        marked = self._marked_spans(dicts, tools) if self._marks_answers and not prompt else None
        for index, message in enumerate(messages):
            if not message.is_answer:
                continue
            # 2. The answer's place. An earlier answer must read as it does in the last message, as it is served.
            sent = self._prompt_before(marked_messages, index, tools)
            start, end = self._place(text, spans, index, sent, index == last)
            reasoning = f"{marks[0]}{2 * index + 1}{marks[1]}"
            served: str | None = text[start:end]
            if not prompt and index != last:
                served = self._served_answer(marked_messages[: index + 1], tools, marks, sent)
                if start < 0 or served != text[start:end]:
                    rewritten.add(index)
                if start >= 0 and not (text.startswith(sent) and start == len(sent)):
                    moved.add(index)
            if message.reasoning and served is not None and reasoning not in served:
                findings.append("reasoning_dropped")
            if start < 0:
                continue
            # 3. The template's own marks may leave out the beginning of an answer, or all of it.
            opening = "open"
            if marked is not None:
                inside = [span for span in marked if span[0] < end and span[1] > start]
                if inside:
                    start = max(start, inside[0][0])
                else:
                    findings.append("answer_not_marked")
                    opening = "unmarked"
            cuts += [(start, 0, opening, index), (end, -1, "close", index)]
        steps = tuple(_steps(text, sorted(cuts, key=lambda cut: cut[:2])))
        return _Skeleton(steps, tuple(dict.fromkeys(findings)), frozenset(rewritten), frozenset(moved))

    def _prompt_before(self, messages: Sequence[Message], index: int, tools: Sequence[str]) -> str:
        """Return the prompt for the answer at `index`; where there is none, a text with which no rendering begins."""
        try:
            return self._render(messages[:index], tools, True) if index else "\0"
        except RefusedError:
            return "\0"

    def _place(
        self, text: str, spans: Sequence[tuple[int, int, int]], index: int, sent: str, is_last: bool
    ) -> tuple[int, int]:
        """Return where an answer starts and ends in a rendering; (-1, -1) if an earlier answer is not found in it.

        Raises:
            RefusedError: The last answer does not follow its prompt, or does not end with a terminator.
        """
        # 1. An answer starts where the prompt before it ends, or else after the text that opens an answer.
        own = [(start, end) for slot, start, end in spans if slot // 2 == index]
        if text.startswith(sent) and not (own and own[0][0] < len(sent)):
            start = len(sent)
        elif is_last:
            problem = (
                "the template's prompt for the last answer is not the beginning of the conversation with the answer"
            )
            raise RefusedError("prompt_not_prefix", problem)
        elif not own:
            return -1, -1
        else:
            before = max((end for _, _, end in spans if end <= own[0][0]), default=0)
            header = self._generation_prompt
            place = text.rfind(header, before, own[0][0]) if header else -1
            start = place + len(header) if place >= 0 else own[0][0]
        # 2. It ends with its terminator, before the next text begins.
        end = self._end_of_answer(text, own[-1][1] if own else start, spans)
        if end < 0 and is_last:
            problem = f"the template ends the assistant's message without {self._stop_names[0]}"
            raise RefusedError("no_terminator", problem)
        return (start, end) if end >= 0 else (-1, -1)

    def _end_of_answer(self, text: str, content_end: int, spans: Sequence[tuple[int, int, int]]) -> int:
        limit = min((begin for _, begin, _ in spans if begin >= content_end), default=len(text))
        found = [(text.find(name, content_end, limit), len(name)) for name in self._stop_names]
        return min((place + length for place, length in found if place >= 0), default=-1)

    def _served_answer(
        self, messages: Sequence[Message], tools: Sequence[str], marks: tuple[str, str], sent: str
    ) -> str | None:
        """Return the text of the last message's answer behind the prompt `sent`; None if it does not follow that."""
        key = (_shape(messages), tuple(tools), marks, messages[-1].is_answer)
        if key in self._served:
            return self._served[key]
        try:
            text = self._render(messages, tools, False)
            spans = _slot_spans(text, marks)
            start, end = self._place(text, spans, len(messages) - 1, sent, True)
            served: str | None = text[start:end]
        except RefusedError:
            served = None
        if len(self._served) < _CACHE_SIZE:
            self._served[key] = served
        return served

    def _marked_spans(self, dicts: list[dict[str, Any]], tools: Sequence[str]) -> list[tuple[int, int]]:
        """Return the spans that the template itself marks with {% generation %}, as (start, end) characters."""
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

    # --- rendering ----------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> str:
        return self._apply([message_with_key(message, self._reasoning_as) for message in messages], tools, prompt)

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
        """Name what a template refuses: the role without which it renders, or the template's own message."""
        for role in ("system", "tool"):
            rest = [entry for entry in dicts if entry["role"] != role]
            if len(rest) == len(dicts):
                continue
            try:
                self.tokenizer.apply_chat_template(
                    rest,
                    tools=[json.loads(tool) for tool in tools] or None,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            except Exception:  # a template can raise anything: this role is not what it refuses
                continue
            return RefusedError(f"{role}_unsupported", f"the template takes no {role} message ({message})")
        return RefusedError("template_refuses", f"the template refuses the conversation ({message})")

    # --- errors ------------------------------------------------------------------------------------------

    def _rewritten(self, messages: Sequence[Message], tools: Sequence[str], prompt: bool) -> RefusedError:
        """Name the message whose content, instead of its sentinel, makes the two renderings differ."""
        marks = _pick_sentinels(messages)
        for index, message in enumerate(messages):
            marked = [m if i == index else _marked(m, i, marks) for i, m in enumerate(messages)]
            text = self._render(marked, tools, prompt)
            if not any(trim(message.content) in text for trim in _TRIMS):
                reason = "thinking_removed" if "</think>" in message.content else "content_rewritten"
                problem = f"the template rewrites the content of message {index + 1} ({message.role})"
                return RefusedError(reason, problem)
        return RefusedError("content_rewritten", "the template rewrites a content")


def _unbounded(limit: Exception) -> UserError:
    reason = "it is nested too deeply" if isinstance(limit, RecursionError) else str(limit)
    problem = f"the template was stopped: {reason}; a template that renders conversations does not"
    return UserError("data.template", problem, "use another template, and do not trust where this one came from")


def _marked(message: Message, index: int, marks: tuple[str, str]) -> Message:
    """Return the message with sentinels in place of its texts; an empty text stays empty, as templates test for it."""
    content = f"{marks[0]}{2 * index}{marks[1]}" if message.content else ""
    reasoning = f"{marks[0]}{2 * index + 1}{marks[1]}" if message.reasoning else ""
    return replace(message, content=content, reasoning=reasoning)


def _pick_sentinels(messages: Sequence[Message]) -> tuple[str, str]:
    for marks in _SENTINELS:
        if not any(marks[0] in m.content or marks[0] in m.reasoning for m in messages):
            return marks
    raise RefusedError("sentinels_spelled", "a content uses all private-use characters that mark contents")


def _shape(messages: Sequence[Message]) -> tuple[Any, ...]:
    """Return what decides the rendering of messages beside their texts."""
    return tuple((m.role, bool(m.content), bool(m.reasoning), m.tool_calls, m.name, m.call_id) for m in messages)


def _has_outer_space(message: Message) -> bool:
    return message.is_answer and any(text != text.strip() for text in (message.content, message.reasoning))


def _slot_spans(text: str, marks: tuple[str, str]) -> list[tuple[int, int, int]]:
    """Return (slot, start, end) of every sentinel in a rendering."""
    sentinels = re.finditer(f"{marks[0]}(\\d+){marks[1]}", text)
    return [(int(match[1]), match.start(), match.end()) for match in sentinels]


def _check_slots(messages: Sequence[Message], found: list[int], last: int) -> None:
    """Make sure that every content is written once; the template may leave out an answer that is not the last message.

    Raises:
        RefusedError: A content is left out or written twice.
    """
    for index, message in enumerate(messages):
        times = found.count(2 * index)
        if not message.content or times == 1 or (times == 0 and message.is_answer and index != last):
            continue
        verb = "drops" if times == 0 else "repeats"
        reason = f"{message.role}_{'dropped' if times == 0 else 'repeated'}"
        raise RefusedError(reason, f"the template {verb} the content of message {index + 1} ({message.role})")


def _steps(text: str, cuts: list[tuple[int, int, str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the steps of a skeleton: the template's texts, and between them the cuts, sorted by their place."""
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
    """Align the real rendering with the skeleton. Return each slot's text as the template wrote it, or None."""
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
