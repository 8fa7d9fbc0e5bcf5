"""A conversation as one row, or as one row per answer where its template writes answers otherwise in the history.

Templates of reasoning models remove the reasoning from earlier answers, or write an empty block of reasoning only into
the last message. In one row the earlier answers would then be learned in a form in which they are never served. So such
a conversation becomes one row for each answer, which ends with that answer as the last message, behind the history as
serving renders it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from minisft.data.conversation import Conversation
from minisft.data.renderers.base import RefusedError, Rendered


@dataclass(frozen=True)
class RenderedRow:
    """A row of the data set before it is encoded.

    Args:
        conversation: The conversation, or its beginning up to the one answer that is supervised.
        rendered: Its rendering.
        answer: Number of that answer in the conversation, from 1; None for a conversation in one row.
    """

    conversation: Conversation
    rendered: Rendered
    answer: int | None = None


def unroll(
    conversation: Conversation, rendered: Rendered, render: Callable[[Conversation], Rendered], mode: str
) -> list[RenderedRow]:
    """Return the rows of a conversation.

    Args:
        conversation: The conversation.
        rendered: Its rendering in one row.
        render: Renders a conversation.
        mode: `data.unroll`: auto unrolls if a supervised answer is written otherwise than it is served; always unrolls
            if there are several supervised answers; never leaves out the answers that are not written as served.

    Raises:
        RefusedError: The template cannot render one of the rows faithfully, or nothing is left to learn.
    """
    supervised = [place for place, m in enumerate(conversation.messages) if m.is_answer and m.supervised]
    if mode == "never" and len(rendered.left_out) == len(supervised):
        problem = "no answer is written as it is served, so data.unroll: never leaves nothing to learn"
        raise RefusedError("nothing_as_served", problem)
    if not (rendered.left_out if mode == "auto" else mode == "always" and len(supervised) > 1):
        return [RenderedRow(conversation, rendered)]
    rows, answers = [], 0
    for place, message in enumerate(conversation.messages):
        answers += message.is_answer
        if message.is_answer and message.supervised:
            part = replace(conversation, messages=conversation.messages[: place + 1]).supervise("last")
            rows.append(RenderedRow(part, render(part), answers))
    return rows
