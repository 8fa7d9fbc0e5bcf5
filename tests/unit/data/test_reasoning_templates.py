"""Templates of reasoning models: every answer is learned as it is served, behind the prompt that serving sends.

The reference is `apply_chat_template` of transformers: the prompt is its rendering of the messages before an answer,
and the answer is what its rendering with the answer as the last message adds to that.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisft.data.conversation import Conversation, Message, ToolCall, message_as_dict
from minisft.data.encoder import Encoder
from minisft.data.renderers.base import RefusedError
from minisft.data.unrolling import unroll
from minisft.errors import UserError
from tests.unit.data.test_published_templates import FOLDER, STUBS
from tests.unit.data.toys import bpe_tokenizer

QWEN3 = (FOLDER / "qwen3.jinja").read_text()
# Templates in the manner of published ones, in a few lines.
QWEN35 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\\n' + (m.reasoning_content | default('')) + '\\n</think>\\n\\n' }}
{%- endif %}
{{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false else '<think>\\n' }}
{%- endif %}"""
HARMONY = """{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set later = namespace(final=false) %}
{%- for n in messages[loop.index:] %}{% if n.role == 'assistant' and not n.tool_calls %}{% set later.final = true %}{% endif %}{% endfor %}
{%- if m.tool_calls %}
{%- if m.thinking and not later.final %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson }}
{{- '<|call|>' }}
{%- elif loop.last and not add_generation_prompt %}
{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- else %}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
CLOSED_BLOCK = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{%- endif %}"""
OPEN_BLOCK = CLOSED_BLOCK.replace("\\n\\n</think>\\n\\n", "\\n")  # as the distilled DeepSeek-R1 models
PARTS = """{%- for m in messages %}
{%- if m.content is string %}{{- '<|im_start|>' + m.role + m.content + '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role }}
{%- for part in m.content %}
{%- if part.type == 'thinking' %}{{- '<think>' + part.thinking + '</think>' }}{%- else %}{{- part.text }}{%- endif %}
{%- endfor %}{{- '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"""
ADD = '[{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]'


def make(template, **options):
    special = ("<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>")
    stub = STUBS["qwen3"] if template != HARMONY else {"special": special, "eos": "<|return|>"}
    tokenizer = bpe_tokenizer(**stub)
    return tokenizer, Encoder(tokenizer, template, options)


def ask(*answers):
    """A conversation of one question for each answer, which is a text, or a text and its reasoning."""
    messages = []
    for number, answer in enumerate(answers, 1):
        text, reasoning = (answer, "") if isinstance(answer, str) else answer
        messages += [Message("user", f"{number} + 0?"), Message("assistant", text, reasoning=reasoning)]
    return Conversation(tuple(messages))


def rows_of(encoder, conversation, mode="auto"):
    rows = unroll(conversation, encoder.render(conversation), encoder.render, mode)
    return [(row, encoder.encode_rendered([row.rendered], [row.conversation])[0]) for row in rows]


def taught(tokenizer, encoder, conversation, mode="auto"):
    """The prompt and the answer of each supervised answer, as text."""
    return [
        (tokenizer.decode(encoded.input_ids[: span.start]), tokenizer.decode(encoded.input_ids[span.start : span.end]))
        for _, encoded in rows_of(encoder, conversation, mode)
        for span in encoded.answers
        if span.supervised
    ]


def served(tokenizer, encoder, conversation, key="reasoning_content"):
    """The prompt and the answer of each answer, as transformers renders them."""

    def render(messages, prompt):
        entries = [message_as_dict(message) for message in messages]
        for entry in entries:
            if "reasoning_content" in entry:
                entry[key] = entry.pop("reasoning_content")
        tools = json.loads(conversation.tools) if conversation.tools else None
        return tokenizer.apply_chat_template(
            entries, tools=tools, tokenize=False, chat_template=encoder.chat_template, add_generation_prompt=prompt
        )

    pairs = []
    for place, message in enumerate(conversation.messages):
        if message.is_answer:
            prompt = render(conversation.messages[:place], True)
            complete = render(conversation.messages[: place + 1], False)
            pairs.append((prompt, complete[len(prompt) :].rstrip("\n") if complete.startswith(prompt) else None))
    return pairs


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("template", [QWEN3, QWEN35], ids=["qwen3", "qwen3.5"])
@pytest.mark.parametrize(
    "conversation",
    [ask(("It is 1.", "One and zero."), ("It is 2.", "Two and zero.")), ask("It is 1.", "It is 2."), ask("It is 1.")],
    ids=["reasoning", "plain", "one answer"],
)
def test_every_answer_is_learned_as_it_is_served(template, conversation, mode):
    tokenizer, encoder = make(template)
    assert taught(tokenizer, encoder, conversation, mode) == served(tokenizer, encoder, conversation)


def test_without_thinking_nothing_of_qwen3_is_unrolled_but_what_differs():
    tokenizer, encoder = make(QWEN3, enable_thinking=False)
    conversation = ask("It is 1.", "It is 2.")
    assert taught(tokenizer, encoder, conversation) == served(tokenizer, encoder, conversation)
    assert "<think>\n\n</think>\n\n" in encoder.tokenizer.decode(encoder.encode_prompt(conversation.messages[:1]))
    with pytest.raises(RefusedError) as refusal:  # the prompt says not to think, and the answer does
        rows_of(encoder, ask(("It is 1.", "One and zero."), "It is 2."))
    assert refusal.value.reason == "prompt_not_prefix"
    assert "</think>" in refusal.value.problem


def test_harmony_ends_the_last_answer_otherwise_and_drops_earlier_analysis():
    tokenizer, encoder = make(HARMONY)
    conversation = ask(("It is 1.", "One and zero."), "It is 2.")
    assert taught(tokenizer, encoder, conversation) == served(tokenizer, encoder, conversation, "thinking")
    assert [answer for _, answer in taught(tokenizer, encoder, conversation)] == [
        "<|channel|>analysis<|message|>One and zero.<|end|><|start|>assistant<|channel|>final<|message|>It is 1.<|return|>",
        "<|channel|>final<|message|>It is 2.<|return|>",
    ]


def test_a_row_is_prompt_and_answer_where_the_template_rewrites_the_prompt_after_the_answer():
    tokenizer, encoder = make(HARMONY)
    call = Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 1}'),), reasoning="I must add.")
    last = Message("assistant", "It is 1.", reasoning="Done.")
    conversation = Conversation((Message("user", "1 + 0?"), call, Message("tool", "1"), last))
    (_, (prompt, answer)) = pairs = taught(tokenizer, encoder, conversation)
    assert [sent for sent, _ in pairs] == [sent for sent, _ in served(tokenizer, encoder, conversation, "thinking")]
    assert "I must add." in prompt  # which the rendering with the final answer drops
    assert answer.endswith("final<|message|>It is 1.<|return|>")
    rows = rows_of(encoder, conversation)
    assert "prompt_rewritten" in rows[-1][1].findings
    assert encoder.encode_prompt(conversation.messages[:3]) == rows[-1][1].input_ids[: rows[-1][1].answers[-1].start]
    stops = tokenizer.convert_ids_to_tokens(list(encoder.stop_token_ids))
    assert stops == ["<|return|>", "<|call|>"]


def test_an_empty_block_that_only_the_prompt_has_stays_before_the_answer():
    tokenizer, encoder = make(CLOSED_BLOCK)
    pairs = taught(tokenizer, encoder, ask("It is 1."))
    assert pairs == [
        ("<|im_start|>user\n1 + 0?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "It is 1.<|im_end|>")
    ]


def test_a_prompt_that_opens_reasoning_which_the_rendering_leaves_out_is_refused():
    _, encoder = make(OPEN_BLOCK)
    with pytest.raises(RefusedError) as refusal:
        encoder.render(ask("It is 1."))
    assert refusal.value.reason == "prompt_not_prefix"
    assert "<think>" in refusal.value.problem


def test_reasoning_as_a_part_of_the_content():
    tokenizer, encoder = make(PARTS)
    pairs = taught(tokenizer, encoder, ask(("It is 1.", "One and zero."), "It is 2."))
    assert [answer for _, answer in pairs] == ["<think>One and zero.</think>It is 1.<|im_end|>", "It is 2.<|im_end|>"]


def test_never_learns_only_what_is_written_as_it_is_served():
    tokenizer, encoder = make(QWEN3)
    conversation = ask(("It is 1.", "One and zero."), ("It is 2.", "Two and zero."))
    [(row, encoded)] = rows_of(encoder, conversation, "never")
    assert row.answer is None
    assert encoded.left_out == 1
    assert taught(tokenizer, encoder, conversation, "never") == served(tokenizer, encoder, conversation)[1:]
    nothing = Conversation((*conversation.messages[:3], Message("assistant", "It is 2.", supervised=False)))
    with pytest.raises(RefusedError) as refusal:
        rows_of(encoder, nothing, "never")
    assert refusal.value.reason == "nothing_as_served"


def test_white_space_that_only_the_last_message_loses_counts_as_written_otherwise():
    template = CLOSED_BLOCK.replace("m.content", "(m.content.strip() if loop.last else m.content)").replace(
        "<think>\\n\\n</think>\\n\\n", ""
    )
    tokenizer, encoder = make(template)
    assert len(rows_of(encoder, ask("It is 1.", "It is 2."))) == 1
    assert len(rows_of(encoder, ask("It is 1. ", "It is 2."))) == 2
    assert taught(tokenizer, encoder, ask("It is 1. ", "It is 2."))[0][1] == "It is 1.<|im_end|>"


PLAIN = st.text(alphabet="abc d.", min_size=1, max_size=6).map(lambda text: f"x{text}y")


@st.composite
def conversations(draw):
    messages = [Message("system", draw(PLAIN))] if draw(st.booleans()) else []
    tools = draw(st.booleans())
    thinks = draw(st.booleans())
    reasoning = PLAIN if thinks else st.just("")
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(PLAIN)))
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            call = ToolCall("add", json.dumps({"a": draw(st.integers(0, 9))}))
            text = draw(st.sampled_from(["", "I add."]))
            messages.append(
                Message("assistant", text, tool_calls=(call,), reasoning=draw(st.one_of(st.just(""), reasoning)))
            )
            messages.append(Message("tool", draw(PLAIN)))
        messages.append(Message("assistant", draw(PLAIN), reasoning=draw(st.one_of(st.just(""), reasoning))))
    return Conversation(tuple(messages), tools=ADD if tools else "")


ENCODERS = {thinking: make(QWEN3, **({} if thinking else {"enable_thinking": False})) for thinking in (True, False)}


def check_random_conversations(count):
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversation=conversations(), thinking=st.booleans())
    def check(conversation, thinking):
        tokenizer, encoder = ENCODERS[thinking]
        expected = served(tokenizer, encoder, conversation)
        if any(answer is None for _, answer in expected):  # reasoning behind a prompt that switches it off
            with pytest.raises(RefusedError):
                rows_of(encoder, conversation)
            return
        assert taught(tokenizer, encoder, conversation) == expected
        for row, encoded in rows_of(encoder, conversation):
            for span in encoded.answers:
                if span.supervised:
                    before = row.conversation.messages[: span.message]
                    assert encoder.encode_prompt(before, conversation.tools) == encoded.input_ids[: span.start]

    check()


def test_random_conversations_of_qwen3_are_learned_as_they_are_served():
    check_random_conversations(100)


@pytest.mark.long
def test_two_thousand_random_conversations_of_qwen3_are_learned_as_they_are_served():
    check_random_conversations(2000)


def test_generated_answers_are_split_into_reasoning_and_answer():
    def split(template, text, **options):
        tokenizer, encoder = make(template, **options)
        return encoder.split_answer(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert split(QWEN3, "<think>\nOne.\n</think>\n\nIt is 1.<|im_end|>") == ("One.", "It is 1.")
    assert split(QWEN3, "<think>\n\n</think>\n\nIt is 1.") == ("", "It is 1.")
    assert split(QWEN3, "It is 1.") == ("", "It is 1.")
    assert split(QWEN3, "<think>\nOne and") == ("One and", "")
    assert split(QWEN35, "One.\n</think>\n\nIt is 1.<|im_end|>") == ("One.", "It is 1.")
    assert split(QWEN35, "One and") == ("One and", "")
    assert split(QWEN35, "It is 1.", enable_thinking=False) == ("", "It is 1.")
    analysis = (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>It is 1.<|return|>"
    )
    assert split(HARMONY, analysis) == ("One.", "It is 1.")
    assert split(HARMONY, "<|channel|>final<|message|>It is 1.<|return|>") == ("", "It is 1.")


def test_options_are_saved_in_the_template_and_a_caller_can_override_them():
    tokenizer, encoder = make(QWEN3, enable_thinking=False)
    tokenizer.chat_template = encoder.chat_template
    assert Encoder(tokenizer, "auto").encode_prompt(ask("x").messages[:1]) == encoder.encode_prompt(
        ask("x").messages[:1]
    )
    question = [{"role": "user", "content": "Hello"}]
    assert "<think>" in tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    thinking = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert "<think>" not in thinking
    with_break = "\n" + QWEN3
    plain, named = make(with_break)[1], make(with_break, enable_thinking=True)[1]
    assert plain.encode(ask("x")).input_ids == named.encode(ask("x")).input_ids


@pytest.mark.parametrize(
    ("template", "options", "text"),
    [
        (QWEN3, {"enable_thinkin": False}, "does not read the variable 'enable_thinkin'"),
        (QWEN3, {"content": "x"}, "does not read the variable 'content'"),
        (QWEN3, {"messages": "x"}, "a variable that every template is given"),
        ("chatml", {"enable_thinking": False}, "the template chatml reads no variables"),
        (PARTS, {"enable_thinking": False}, "does not read the variable 'enable_thinking'"),
    ],
)
def test_an_option_that_the_template_does_not_read_is_refused(template, options, text):
    with pytest.raises(UserError) as refusal:
        make(template, **options)
    assert refusal.value.where == "data.template_options"
    assert text in refusal.value.problem
