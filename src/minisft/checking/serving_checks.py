"""Train and serve: what is sent and where generation stops is what was trained, here and in other tools.

What other tools do was read in their sources: vLLM (`vllm/renderers/hf.py`, `chat_completion/protocol.py`) renders
the saved template to text and encodes it without special tokens, and hands contents as lists of parts to a template
that loops over them; `transformers chat` and `transformers serve` (`cli/serving/chat_completion.py`) call
`apply_chat_template` with plain texts.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from minisft.chat.terminal import Session
from minisft.checking.context import CheckContext, Example, as_conversation, as_token_row
from minisft.checking.result import Failed, NotRun
from minisft.data.conversation import Conversation, Message, message_as_dict
from minisft.data.renderers.templates import NATIVE_TEMPLATES
from minisft.evaluation.examples import load_held_out

SAMPLE = 64  # conversations
_OWN = (*NATIVE_TEMPLATES, "mistral-text")
_FAULT = "remove `<output>/dataset` and check again; if it stays so, report it"
_TEMPLATE = "use data.template: chatml or mistral, which other tools render alike, or fix the template"

Render = Callable[[Any, list[dict[str, Any]], list[Any] | None, bool], list[int]]


def prompts_are_those_trained(context: CheckContext) -> str:
    """Compare the ids that evaluation and chat send with the beginning of the training rows."""
    sent = _compare_evaluation(context)
    talked = 0
    for example in context.sample(SAMPLE):
        for place, ids in _trained_prompts(context, example):
            _compare(example.conversation.location, "encode_prompt", _prompt_ids(context, example, place), ids)
            if not example.conversation.tools and example.is_plain:
                _compare(example.conversation.location, "chat", _chat_ids(context, example.conversation, place), ids)
                talked += 1
    return f"{sent} prompts of evaluation, {talked} of chat"


def _compare_evaluation(context: CheckContext) -> int:
    """Compare evaluation's own questions with the test rows they come from; return how many there are."""
    test = context.splits["test"]
    if not len(test):
        return 0
    held_out = load_held_out(context.prepared.folder.parent, context.encoder, "all", SAMPLE)
    examples = iter(held_out.examples)
    compared = 0
    for row in test.select(range(min(SAMPLE, len(test)))):
        example = Example(as_conversation(row), as_token_row(row))
        expected = dict(_trained_prompts(context, example))
        for place in _learned_places(example.conversation):
            eval_example = next(examples)
            if place in expected:
                _compare(example.conversation.location, "evaluation", eval_example.prompt_ids, expected[place])
                compared += 1
    return compared


def _learned_places(conversation: Conversation) -> list[int]:
    return [place for place, m in enumerate(conversation.messages) if m.is_answer and m.supervised]


def _trained_prompts(context: CheckContext, example: Example) -> list[tuple[int, list[int]]]:
    """(the answer's place among the messages, what stands before it in the training row).

    A template that rewrites the history as it goes on is held to the last answer alone.
    """
    places, stretches = _learned_places(example.conversation), example.row.answers()
    pairs = [(place, example.row.ids[:start]) for place, (start, _) in zip(places, stretches, strict=True)]
    has_system = example.conversation.messages[0].role == "system" or bool(example.conversation.tools)
    moves = context.encoder.template_name == "mistral-v3" and has_system
    return pairs[-1:] if moves or "history_rewritten" in example.row.findings else pairs


def _prompt_ids(context: CheckContext, example: Example, place: int) -> list[int]:
    return context.encoder.encode_prompt(example.conversation.messages[:place], example.conversation.tools)


def _chat_ids(context: CheckContext, conversation: Conversation, place: int) -> list[int]:
    before = conversation.messages[:place]
    system = before[0].content if before[0].role == "system" else ""
    session: Any = Session(None, context.encoder, system=system)  # type: ignore[arg-type]  # no model is asked
    session.turns = list(before[1:] if system else before)
    return list(session.prompt())


def _compare(where: str, who: str, sent: Sequence[int], trained: Sequence[int]) -> None:
    if list(sent) == list(trained):
        return
    pairs = enumerate(zip(sent, trained, strict=False))
    differs = next((place for place, (a, b) in pairs if a != b), min(len(sent), len(trained)))
    raise Failed(f"{where}: what {who} sends differs from what was trained, from token {differs} on", _FAULT)


def stops_are_those_trained(context: CheckContext) -> str:
    """Collect the last learned token of every whole answer: at these, and no others, generation stops."""
    trained = {
        example.row.labels[end - 1]
        for example in context.examples
        if not example.row.is_cut
        for _, end in example.row.answers()
    }
    stops = set(context.encoder.stop_token_ids)
    name = context.encoder.tokenizer.convert_ids_to_tokens
    if trained != stops:
        problem = f"answers end with {name(sorted(trained))}, generation stops at {name(sorted(stops))}"
        raise Failed(problem, "use another data.template, or fix the one in use")
    return ", ".join(map(repr, name(sorted(stops))))


def saved_template_renders_alike(context: CheckContext) -> str:
    """Save the tokenizer as training does, load it as others do, and render with plain `apply_chat_template`."""
    return _compare_with(context, _plain)


def vllm_renders_alike(context: CheckContext) -> str:
    """The same in vLLM's way."""
    saved = context.saved_tokenizer
    parts = loops_over_content(str(saved.chat_template))
    return _compare_with(context, _as_vllm) + ("; contents as parts" if parts else "")


def _compare_with(context: CheckContext, render: Render) -> str:
    """Render conversations with the saved template and compare the ids with ours.

    Where a text spells a control token, or the tokenizer would join the end of a prompt with its answer, other ids
    of the same text are what the documentation of `data` says; the text must be the same.
    """
    saved = context.saved_tokenizer
    same = other = 0
    for example in context.sample(SAMPLE):
        for messages, ids, prompt in _renderings(context, example):
            tools = json.loads(example.conversation.tools) if example.conversation.tools else None
            rendered = render(saved, [message_as_dict(message) for message in messages], tools, prompt)
            if rendered == ids:
                same += 1
            elif saved.decode(rendered) == saved.decode(ids):
                other += 1
            else:
                raise Failed(_difference(saved, example.conversation.location, rendered, ids), _TEMPLATE)
    if not same + other:
        raise NotRun("no sampled conversation has a form that the template is called with")
    if other > same:
        problem = f"of {same + other} renderings {other} have the text of ours, but other tokens"
        raise Failed(problem, _TEMPLATE)
    return f"{same} renderings" + (f"; {other} with the same text in other tokens" if other else "")


def _renderings(context: CheckContext, example: Example) -> list[tuple[Sequence[Message], list[int], bool]]:
    """(messages, our ids, whether it is a prompt) of the prompts of a conversation and of the whole of it."""
    encoder = context.encoder
    messages: Sequence[Message] = example.conversation.messages
    if not example.is_plain and encoder.template_name in _OWN:
        return []  # calls may be spelled as the data spells them
    if example.conversation.tools and "tools" not in encoder.chat_template:
        return []  # a template without tools finds them in the system prompt
    prompts: list[tuple[Sequence[Message], list[int], bool]] = [
        (messages[:place], ids, True) for place, ids in _trained_prompts(context, example)
    ]
    return prompts if example.row.is_cut else [*prompts, (messages, example.row.ids, False)]


def _difference(tokenizer: Any, where: str, rendered: list[int], ids: list[int]) -> str:
    theirs, ours = tokenizer.decode(rendered), tokenizer.decode(ids)
    pairs = enumerate(zip(theirs, ours, strict=False))
    place = next((at for at, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    begin = max(0, place - 20)
    return f"{where}: the saved template gives {theirs[begin : place + 20]!r}, training {ours[begin : place + 20]!r}"


def _plain(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> list[int]:
    called = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, add_generation_prompt=prompt, return_dict=True
    )
    return list(called["input_ids"])


def _as_vllm(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> list[int]:
    if loops_over_content(str(tokenizer.chat_template)):
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} if message["content"] else message
            for message in messages
        ]
    text = tokenizer.apply_chat_template(
        conversation=messages,
        tools=tools,
        chat_template=tokenizer.get_chat_template(None, tools=tools),
        tokenize=False,
        add_generation_prompt=prompt,
        continue_final_message=False,
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@cache
def loops_over_content(template: str) -> bool:
    """Whether a template loops over a message's content, which then comes as a list of parts (vLLM's rule)."""
    import jinja2.nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    loops = (loop.iter for loop in tree.find_all(jinja2.nodes.For))
    return any(_is_content(node) for node in loops)


def _is_content(node: Any) -> bool:
    import jinja2.nodes

    if isinstance(node, (jinja2.nodes.Filter, jinja2.nodes.Test)):
        return node.node is not None and _is_content(node.node)
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if not isinstance(node, jinja2.nodes.Getitem):
        return False
    if isinstance(node.arg, jinja2.nodes.Slice):
        return _is_content(node.node)
    return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
