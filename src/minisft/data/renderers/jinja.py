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
_SENTINEL = re.compile("[\ue000\ue8a0\U000f0000]\\d*[\ue001\ue8a1\U000f0001]?")  # also one that is cut
_CACHE_SIZE = 4096
_AFTER_ANSWER = 64  # characters that a template may write after an answer's terminator
_A_TOOL = '{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}'
_TRIMS = (str, str.strip, str.rstrip, str.lstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"))


@dataclass(frozen=True)
class _Skeleton:
    """A rendering without its contents: the steps that build it with them, and findings about the template.

    A step is ("text", the template's own), ("slot", its number), ("open", message) or ("close", message);
    ("unmarked", message) opens an answer that the template's own marks leave out. `rewritten` are the messages whose
    answers the template writes otherwise as the last message, and `moved` those behind another prompt than that of
    inference. Where `prompt_rewritten` is true, the rendering does not begin with the prompt for its last answer, and
    the row is that prompt and the answer.
    """

    steps: tuple[tuple[str, Any], ...]
    findings: tuple[str, ...]
    rewritten: frozenset[int]
    moved: frozenset[int]
    prompt_rewritten: bool

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
        self._served: dict[Any, str] = {}
        self._structured_calls = "tool_calls" in template
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._structured_tools = re.search(r"\btools\b", template) is not None
        self._reasoning_as = REASONING_KEYS[0]
        question = Message("user", "Hello")
        # 1. The tokens that end an answer.
        try:
            stop = self._find_stop(question)
            self._stop_names = [stop, *self._end_of_calls(question, stop)]
        except RefusedError as refusal:
            raise UserError("data.template", refusal.problem, "use another template") from None
        self.stops = tuple(splitter.controls[name].id for name in self._stop_names)
        # 2. The generation prompt is the text that a rendering for inference adds.
        without, within = self._render([question], (), False), self._render([question], (), True)
        self._generation_prompt = within[len(without) :] if within.startswith(without) else ""
        # 3. The form of the reasoning.
        self.reads_reasoning = "reasoning_content" in template
        self.form = self._find_form(question, within)

    def _find_stop(self, question: Message) -> str:
        """Return the special token that ends an answer.

        It is the last one that follows an answer both at the end of a conversation and before another question; or,
        where these differ (a template may end a conversation otherwise), the first one at the end of a conversation.
        """
        mark = f"{_SENTINELS[0][0]}2{_SENTINELS[0][1]}"
        answer = Message("assistant", mark)
        end = self._render([question, answer], (), False).partition(mark)[2]
        try:
            more = self._render([question, answer, question, answer], (), False).partition(mark)[2]
        except RefusedError:
            more = ""
        shared = _common_length(end, more)
        found = [match for match in self._special.finditer(end) if match.end() <= shared]
        match = found[-1] if found else self._special.search(end)
        if match is None:
            raise UserError(
                "data.template",
                "the template does not end an answer with a special token of this tokenizer, so a model would not stop",
                "use data.template: chatml or mistral, which end answers with the EOS token, or fix the template",
            )
        return match.group()

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
            dumped = re.search("['\"]thinking['\"]", text)  # the list of parts, written as a list
            if not 0 <= text.find(reasoning) < text.find(content) or dumped:
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
        # 2. Render with sentinels in place of the texts, and with the texts, and compare.
        skeleton, filled = self._fitted(messages, passed, prompt)
        steps, rewritten, moved = skeleton.steps, skeleton.rewritten, skeleton.moved
        findings = list(skeleton.findings)
        if skeleton.prompt_rewritten:
            before, earlier = self._fitted(messages[:-1], passed, True)
            filled = filled | earlier
            answer = [step[0] in ("open", "unmarked") and step[1] == len(messages) - 1 for step in steps].index(True)
            steps, rewritten, moved = before.steps + steps[answer:], before.rewritten, before.moved
            findings.append("prompt_rewritten")
        slots = _slots(messages)
        if any(text != slots[slot] for slot, text in filled.items()):
            findings.append("trimmed")
        # 3. Build the segments.
        rewritten |= self._trimmed_otherwise(steps, filled, messages, passed)
        rendered = self._build(steps, filled, messages, rewritten, shift)
        rendered.findings = findings
        rendered.left_out = tuple(index - shift for index in sorted(rewritten) if messages[index].supervised)
        rendered.prompt_differs = any(messages[index].supervised for index in moved - rewritten)
        return rendered

    def _fitted(
        self, messages: Sequence[Message], tools: Sequence[str], prompt: bool
    ) -> tuple[_Skeleton, dict[int, str]]:
        """Return the skeleton of messages, which those of one shape share, and each slot's text as it is rendered."""
        marks = _pick_sentinels(messages)
        key = (_shape(messages), tuple(tools), prompt, marks)
        skeleton = self._cache.get(key)
        if skeleton is None:
            skeleton = self._make_skeleton(messages, tools, prompt, marks)
            if len(self._cache) < _CACHE_SIZE:
                self._cache[key] = skeleton
        filled = _fit(skeleton.literals, _slots(messages), self._render(messages, tools, prompt))
        if filled is None:
            raise self._rewritten(messages, tools, prompt)
        return skeleton, filled

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
        steps: Sequence[tuple[str, Any]],
        filled: dict[int, str],
        messages: Sequence[Message],
        rewritten: frozenset[int],
        shift: int,
    ) -> Rendered:
        builder, open_message, written, unmarked = SegmentBuilder(self.splitter), -1, "", False
        for kind, value in steps:
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
        self,
        steps: Sequence[tuple[str, Any]],
        filled: dict[int, str],
        messages: Sequence[Message],
        tools: Sequence[str],
    ) -> frozenset[int]:
        """Return the earlier answers whose outer white space the template treats otherwise in the last message."""
        found, answer = set(), ""
        for kind, value in steps:
            if kind in ("open", "unmarked"):
                answer = ""
            elif kind != "close":
                answer += filled[value] if kind == "slot" else value
            elif value < len(messages) - 1 and _has_outer_space(messages[value]):
                try:
                    served = self._render(messages[: value + 1], tools, False)
                except RefusedError:
                    served = ""
                if answer not in served[-len(answer) - _AFTER_ANSWER :]:
                    found.add(value)
        return frozenset(found)

    # --- the skeleton -------------------------------------------------------------------------------------

    def _make_skeleton(
        self, messages: Sequence[Message], tools: Sequence[str], prompt: bool, marks: tuple[str, str]
    ) -> _Skeleton:
        # 1. Render with sentinels, and find each: (slot, start, end).
        last = -1 if prompt else len(messages) - 1
        given = [_marked(m, i, marks) for i, m in enumerate(messages)]
        text = self._render(given, tools, prompt)
        spans = _slot_spans(text, marks)
        sent = {i: self._prompt_for(given[:i], tools) for i, message in enumerate(messages) if message.is_answer}
        last_sent = sent.get(last)
        prompt_rewritten = bool(last_sent and self._generation_prompt) and not text.startswith(last_sent or "")
        _check_slots(messages, [slot for slot, _, _ in spans], last, only_last=prompt_rewritten)
        findings, rewritten, moved = [], set(), set()
        cuts: list[tuple[int, int, str, Any]] = [(start, 1, "slot", (slot, end)) for slot, start, end in spans]
        dicts = [message_with_key(message, self._reasoning_as) for message in given]
        marked = self._marked_spans(dicts, tools) if self._marks_answers and not prompt else None
        for index, message in enumerate(messages):
            if not message.is_answer:
                continue
            # 2. The answer as it is served: behind its prompt, as the last message. An earlier one must read so, and
            # follow the text that opens an answer.
            served: str | None = None
            try:
                served = self._served_answer(given[: index + 1], tools, marks, sent[index])
            except RefusedError:
                if index == last:
                    raise
            start = self._start_of_answer(text, spans, index, sent[index])
            end = start + len(served) if served is not None and text.startswith(served, start) else -1
            opened = text.endswith(self._generation_prompt, 0, max(start, 0)) or index == last
            if start < 0 or end < 0 or not opened:
                rewritten.add(index)
                end = end if end >= 0 else self._end_of_answer(text, start, spans, index)
            elif not text.startswith(sent[index] or "\0"):
                moved.add(index)
            if message.reasoning and served is not None and f"{marks[0]}{2 * index + 1}{marks[1]}" not in served:
                findings.append("reasoning_dropped")
            if start < 0 or end < 0:
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
        found = tuple(dict.fromkeys(findings))
        return _Skeleton(steps, found, frozenset(rewritten), frozenset(moved - {last}), prompt_rewritten)

    def _prompt_for(self, messages: Sequence[Message], tools: Sequence[str]) -> str | None:
        """Return the prompt for the answer that follows these messages; None if the template refuses it."""
        try:
            return self._render(messages, tools, True) if messages else None
        except RefusedError:
            return None

    def _start_of_answer(self, text: str, spans: Sequence[tuple[int, int, int]], index: int, sent: str | None) -> int:
        """Return where an answer starts in a rendering: where its prompt ends, or else after the text that opens it.

        -1: The rendering does not show it.
        """
        own = [start for slot, start, _ in spans if slot // 2 == index]
        if sent is not None and text.startswith(sent) and not (own and own[0] < len(sent)):
            return len(sent)
        header = self._generation_prompt
        earlier = [end for slot, _, end in spans if (end <= own[0] if own else slot // 2 < index)]
        before = max(earlier, default=0)
        if not header:
            return own[0] if own else -1
        shared = _common_length(sent or "", text)
        if sent is not None and before <= shared <= min(own, default=-1) and self._is_closed_block(sent[shared:]):
            return shared
        after = min((begin for slot, begin, _ in spans if slot // 2 > index), default=len(text))
        place = text.rfind(header, before, own[0]) if own else text.find(header, before, after)
        return place + len(header) if place >= 0 else -1

    def _is_closed_block(self, text: str) -> bool:
        """Return whether a text is an empty block of reasoning between two tokens, which only the prompt has.

        A template whose thinking is switched off may end the prompt with it and leave it out before the answer.
        """
        tokens = re.findall("|".join(map(re.escape, self.splitter.controls)), text)
        return len(tokens) == 2 and tokens[0] != tokens[1] and text.strip().startswith(tokens[0])

    def _end_of_answer(self, text: str, start: int, spans: Sequence[tuple[int, int, int]], index: int) -> int:
        """Return where an answer ends: after its first terminator. -1: it has none before the next text."""
        if start < 0:
            return -1
        content_end = max((end for slot, _, end in spans if slot // 2 == index), default=start)
        limit = min((begin for _, begin, _ in spans if begin >= content_end), default=len(text))
        found = [(text.find(name, content_end, limit), len(name)) for name in self._stop_names]
        return min((place + length for place, length in found if place >= 0), default=-1)

    def _served_answer(
        self, messages: Sequence[Message], tools: Sequence[str], marks: tuple[str, str], sent: str | None
    ) -> str:
        """Return the answer of the last message as it is served: the text behind its prompt `sent`.

        Raises:
            RefusedError: It does not follow its prompt, does not end with a terminator, or has one inside.
        """
        key = (_shape(messages), tuple(tools), marks)
        if key in self._served:
            return self._served[key]
        text = self._render(messages, tools, False)
        spans = _slot_spans(text, marks)
        start = self._start_of_answer(text, spans, len(messages) - 1, sent)
        follows = sent is not None and (text.startswith(sent) or bool(self._generation_prompt))
        if start < 0 or not (follows or len(messages) == 1):
            shown = _after_common(sent or "", text)
            problem = f"the template's prompt for the last answer is not the beginning of its rendering with it{shown}"
            raise RefusedError("prompt_not_prefix", problem)
        end = self._end_of_answer(text, start, spans, len(messages) - 1)
        if end < 0:
            problem = f"the template ends the assistant's message without {self._stop_names[0]}"
            raise RefusedError("no_terminator", problem)
        answer = text[start:end]
        goes_on = self._special.sub("", text[end:]).strip()
        if goes_on or sum(answer.count(name) for name in self._stop_names) > 1:
            problem = f"the template goes on with an answer after {self._stop_names[0]}, at which generation stops"
            raise RefusedError("stop_inside_answer", problem)
        if len(self._served) < _CACHE_SIZE:
            self._served[key] = answer
        return answer

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


def _check_slots(messages: Sequence[Message], found: list[int], last: int, only_last: bool) -> None:
    """Make sure that every content is written once; the template may leave out an answer that is not the last message.

    Raises:
        RefusedError: A content is left out or written twice.
    """
    for index, message in enumerate(messages):
        times = found.count(2 * index)
        if not message.content or times == 1 or (only_last and index != last):
            continue
        if times == 0 and message.is_answer and index != last:
            continue
        verb = "drops" if times == 0 else "repeats"
        reason = f"{message.role}_{'dropped' if times == 0 else 'repeated'}"
        raise RefusedError(reason, f"the template {verb} the content of message {index + 1} ({message.role})")


def _slots(messages: Sequence[Message]) -> dict[int, str]:
    """Return the text of each slot: 2i is the content of message i, 2i + 1 its reasoning."""
    return dict(enumerate(chain.from_iterable((m.content, m.reasoning) for m in messages)))


def _common_length(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _after_common(prompt: str, text: str) -> str:
    """Return how a prompt and a rendering go on where they first differ, for a message."""
    place = _common_length(prompt, text)
    sides = [repr(_SENTINEL.sub("…", side[max(0, place - 20) : place + 20])) for side in (prompt, text)]
    return f" (it reads {sides[0]}, and the rendering {sides[1]})" if prompt else ""


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
