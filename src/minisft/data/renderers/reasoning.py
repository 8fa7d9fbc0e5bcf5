"""Reasoning of answers: the keys under which templates read it, and the text that they write around it."""

import re
from dataclasses import dataclass, replace
from typing import Any

from minisft.data.conversation import Message, message_as_dict

# Keys of a message under which templates read reasoning. Under the last, it is a part of the content's list of parts.
PARTS = "type"
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning", PARTS)
_THINKING = re.compile(r"\s*<think>\n?(?P<reasoning>.*?)\n?</think>\n*(?P<content>.*)", re.DOTALL)


@dataclass(frozen=True)
class AnswerForm:
    """The texts that a template writes into an answer.

    Args:
        opening: Text between the prompt and the reasoning; "" where the prompt ends with it.
        closing: Text between the reasoning and the content.
        alone: Text between the prompt and the content of an answer without reasoning.
    """

    opening: str
    closing: str
    alone: str

    def split(self, text: str) -> tuple[str, str]:
        """Return the reasoning and the content of a generated answer's text."""
        opening, closing, alone = self.opening.strip(), self.closing.strip(), self.alone.strip()
        reasoning, found, content = text.partition(closing)
        if found:
            space = self.closing[self.closing.index(closing) + len(closing) :]
            content = content.removeprefix(space) if content.startswith(space) else content.lstrip("\n")
            return reasoning.strip().removeprefix(opening).strip("\n"), content
        if not opening or text.lstrip().startswith(opening):  # the answer ended before its reasoning did
            return text.strip().removeprefix(opening).strip("\n"), ""
        return "", text.lstrip().removeprefix(alone) if alone and text.lstrip().startswith(alone) else text

    def split_partial(self, text: str) -> tuple[str, str]:
        """Return what is certain of the reasoning and the content while more text may follow.

        A text that ends with the beginning of a marker, such as "</thi", is split without that beginning.
        """
        opening, closing, alone = self.opening.strip(), self.closing.strip(), self.alone.strip()
        begun = text.lstrip()
        if any(begun != marker and marker.startswith(begun) for marker in (opening, closing, alone)):
            return "", ""
        if closing not in text:
            sizes = range(min(len(closing) - 1, len(text)), 0, -1)
            text = text[: len(text) - next((size for size in sizes if text.endswith(closing[:size])), 0)]
        return self.split(text)


def separate_reasoning(message: Message) -> Message:
    """Return an answer with the reasoning in its <think> tags apart from the content."""
    if not message.is_answer or message.reasoning:
        return message
    match = _THINKING.fullmatch(message.content)
    if not match or not match["reasoning"]:
        return message
    return replace(message, content=match["content"], reasoning=match["reasoning"])


def message_with_key(message: Message, key: str) -> dict[str, Any]:
    """Return a message as templates read it, with the reasoning under one of REASONING_KEYS."""
    entry = message_as_dict(message)
    reasoning = entry.pop("reasoning_content", None)
    if reasoning is None:
        return entry
    if key != PARTS:
        return entry | {key: reasoning}
    parts = [{"type": "thinking", "thinking": reasoning}, {"type": "text", "text": message.content}]
    return entry | {"content": [part for part in parts if part.get("text") != ""]}
