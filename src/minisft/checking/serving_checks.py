"""Checks of serving: prompts and stop tokens at inference are those of the training, in MiniSFT and in other tools.

The sources of the other tools show how they render. vLLM (`vllm/renderers/hf.py`, `chat_completion/protocol.py`)
renders the saved template to text and encodes the text without special tokens; a template that loops over the content
gets it as a list of parts. `transformers chat` and `transformers serve` (`cli/serving/chat_completion.py`) call
`apply_chat_template` with plain texts.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from minisft.chat.terminal import Session
from minisft.checking.context import CheckContext, Example
from minisft.checking.result import Failed, NotRun
from minisft.data.conversation import Conversation, Message, message_as_dict
from minisft.data.renderers.templates import MOVING_SYSTEM, MOVING_TOOLS, NATIVE_TEMPLATES
from minisft.evaluation.examples import load_held_out

SAMPLE = 64  # conversations
_BUILT_IN_TEMPLATES = (*NATIVE_TEMPLATES, "mistral-text")
_FAULT = "remove `<output>/dataset` and check again; if it fails again, report it"
_TEMPLATE = "use data.template: chatml or mistral, which other tools render in the same way, or fix the template"

# Renders messages as another tool does: (tokenizer, messages, tools, whether a generation prompt follows) -> input ids.
Render = Callable[[Any, list[dict[str, Any]], list[Any] | None, bool], list[int]]


def prompts_are_those_trained(context: CheckContext) -> str:
    """Compare the ids that evaluation and chat send with the beginning of the training rows."""
    evaluation_prompts = _compare_evaluation(context)
    chat_prompts = 0
    for example in context.sample(SAMPLE):
        conversation = example.conversation
        for index, ids in _trained_prompts(context, example):
            # 1. The encoder's prompt of the messages before the answer.
            before = conversation.messages[:index]
            sent = context.encoder.encode_prompt(before, conversation.tools)
            _compare(conversation.location, "encode_prompt", sent, ids)
            # 2. The prompt of a chat with these messages; a chat has no tools.
            if not conversation.tools and example.is_plain:
                system = before[0].content if before[0].role == "system" else ""
                session: Any = Session(None, context.encoder, system=system)  # type: ignore[arg-type]  # without a model
                session.turns = list(before[1:] if system else before)
                _compare(conversation.location, "chat", session.prompt(), ids)
                chat_prompts += 1
    return f"{evaluation_prompts} prompts of evaluation, {chat_prompts} of chat"


def _compare_evaluation(context: CheckContext) -> int:
    """Compare the prompts of evaluation with the test rows that they come from; return their number."""
    test = context.splits["test"]
    if not len(test):
        return 0
    held_out = load_held_out(context.prepared.folder.parent, context.encoder, "all", SAMPLE)
    ends = [place + 1 for place, messages in enumerate(test["messages"]) if messages is not None][:SAMPLE]
    sent: dict[tuple[str, int], list[list[int]]] = {}  # several conversations may have one id
    for prompt in held_out.examples:
        sent.setdefault((prompt.id, prompt.turn), []).append(prompt.prompt_ids)
    compared = 0
    for example in context.examples_of(test.select(range(ends[-1]))):
        for index, ids in _trained_prompts(context, example):
            conversation = example.conversation
            turn = sum(message.is_answer for message in conversation.messages[: index + 1])
            prompts = sent[conversation.id, turn]
            _compare(conversation.location, "evaluation", ids if ids in prompts else prompts[0], ids)
            compared += 1
    return compared


def _learned_indexes(conversation: Conversation) -> list[int]:
    """Return the indexes of the messages that are learned."""
    return [index for index, message in enumerate(conversation.messages) if message.is_answer and message.supervised]


def _trained_prompts(context: CheckContext, example: Example) -> list[tuple[int, list[int]]]:
    """Return, for each learned answer, the index of its message and the tokens before it in the training row.

    A template that rewrites earlier turns when later ones follow has the trained prompt for the last answer only.
    """
    indexes, spans = _learned_indexes(example.conversation), example.row.answers()
    prompts = [(index, example.row.ids[:start]) for index, (start, _) in zip(indexes, spans, strict=True)]
    name, has_tools = context.encoder.template_name, bool(example.conversation.tools)
    has_system = any(message.role == "system" for message in example.conversation.messages)
    moves = (name in MOVING_SYSTEM and has_system) or (name in MOVING_TOOLS and has_tools)
    rewritten = {"prompt_differs", "earlier_calls_left_out"} & set(example.row.findings)
    return prompts[-1:] if moves or rewritten else prompts


def _compare(where: str, sender: str, sent: Sequence[int], trained: Sequence[int]) -> None:
    if list(sent) == list(trained):
        return
    pairs = enumerate(zip(sent, trained, strict=False))
    position = next((index for index, (a, b) in pairs if a != b), min(len(sent), len(trained)))
    problem = f"the prompt that {sender} sends differs from the training row, from token {position} on"
    raise Failed(f"{where}: {problem}", _FAULT)


def stops_are_those_trained(context: CheckContext) -> str:
    """Collect the last learned token of every complete answer: generation must stop at these and at no others."""
    trained = {
        example.row.labels[end - 1]
        for example in context.examples
        if not example.row.is_cut
        for _, end in example.row.answers()
    }
    stops = set(context.encoder.stop_token_ids)
    to_tokens = context.encoder.tokenizer.convert_ids_to_tokens
    ends_of_calls = set(context.encoder.stop_token_ids[1:])  # the data may have no calls
    if trained - stops or stops - trained - ends_of_calls:
        problem = f"answers end with {to_tokens(sorted(trained))}, generation stops at {to_tokens(sorted(stops))}"
        raise Failed(problem, "use another data.template, or fix the one in use")
    return ", ".join(map(repr, to_tokens(sorted(stops))))


def saved_template_renders_the_same(context: CheckContext) -> str:
    """Save the tokenizer as training does, load it as others do, and render with plain `apply_chat_template`."""
    return _compare_renderings(context, _render_plain)


def vllm_renders_the_same(context: CheckContext) -> str:
    """Save and load the tokenizer, and render as vLLM does."""
    parts = loops_over_content(str(context.saved_tokenizer.chat_template))
    return _compare_renderings(context, _render_as_vllm) + ("; contents as parts" if parts else "")


def _compare_renderings(context: CheckContext, render: Render) -> str:
    """Render conversations with the saved template and compare the ids with those of the training.

    The ids may differ where a text contains the name of a control token, or where the tokenizer would merge the end of
    a prompt with its answer; the documentation of `data` describes both. The text must be the same.
    """
    saved = context.saved_tokenizer
    same_ids = same_text = 0
    for example in context.sample(SAMPLE):
        for messages, ids, is_prompt in _trained_renderings(context, example):
            tools = json.loads(example.conversation.tools) if example.conversation.tools else None
            rendered = render(saved, [message_as_dict(message) for message in messages], tools, is_prompt)
            if rendered == ids:
                same_ids += 1
                continue
            text, trained_text = saved.decode(rendered), saved.decode(ids)
            if text != trained_text:
                pairs = enumerate(zip(text, trained_text, strict=False))
                position = next((index for index, (a, b) in pairs if a != b), min(len(text), len(trained_text)))
                excerpt = slice(max(0, position - 20), position + 20)
                problem = f"the saved template gives {text[excerpt]!r}, training {trained_text[excerpt]!r}"
                raise Failed(f"{example.conversation.location}: {problem}", _TEMPLATE)
            same_text += 1
    if not same_ids + same_text:
        raise NotRun("no sampled conversation has a form that the template is called with")
    if same_text > same_ids:
        problem = f"of {same_ids + same_text} renderings, {same_text} have the text of the training in other tokens"
        raise Failed(problem, _TEMPLATE)
    return f"{same_ids} renderings" + (f"; {same_text} with the same text in other tokens" if same_text else "")


def _trained_renderings(context: CheckContext, example: Example) -> list[tuple[Sequence[Message], list[int], bool]]:
    """Return (messages, trained ids, is a prompt) of a conversation's prompts and of the complete conversation."""
    encoder = context.encoder
    messages: Sequence[Message] = example.conversation.messages
    if not example.is_plain and encoder.template_name in _BUILT_IN_TEMPLATES:
        return []  # the encoder may keep the spelling that calls have in the data
    if example.conversation.tools and "tools" not in encoder.chat_template:
        return []  # the encoder writes tools into the system prompt of a template that does not support them
    prompts: list[tuple[Sequence[Message], list[int], bool]] = [
        (messages[:index], ids, True) for index, ids in _trained_prompts(context, example)
    ]
    if example.row.is_cut or "prompt_rewritten" in example.row.findings:  # not the rendering of a complete conversation
        return prompts
    return [*prompts, (messages, example.row.ids, False)]


def _render_plain(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> list[int]:
    encoding = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, add_generation_prompt=prompt, return_dict=True
    )
    return list(encoding["input_ids"])


def _render_as_vllm(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> list[int]:
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
    """Return whether a template loops over a message's content: vLLM then passes it as a list of parts."""
    import jinja2.nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    loops = (loop.iter for loop in tree.find_all(jinja2.nodes.For))
    return any(_is_content(node) for node in loops)


def _is_content(node: Any) -> bool:
    """Return whether a node of a template is a message's content, possibly filtered, tested or sliced."""
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
