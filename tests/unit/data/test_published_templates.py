"""Chat templates in use today, from their published form, on stub tokenizers: right spans, or a refusal by name."""

from pathlib import Path

import pytest

from minisft.data.conversation import Conversation, Message, ToolCall
from minisft.data.encoder import Encoder
from minisft.data.renderers.base import RefusedError
from tests.unit.data.toys import bpe_tokenizer

FOLDER = Path(__file__).parent / "published"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
QWEN_ORDINARY = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
STUBS: dict[str, dict] = {
    "smollm2": {"special": CHATML[:3], "eos": "<|im_end|>"},
    "smollm3_marked": {"special": CHATML[:3], "eos": "<|im_end|>"},
    "qwen25": {"special": CHATML[:3], "eos": "<|im_end|>", "ordinary": QWEN_ORDINARY[:2]},
    "qwen3": {"special": CHATML[:3], "eos": "<|im_end|>", "ordinary": QWEN_ORDINARY},
    "phi4": {"special": CHATML, "eos": "<|im_end|>"},
    "phi3": {"special": ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), "eos": "<|endoftext|>"},
    "llama3": {
        "special": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "eos": "<|eot_id|>",
        "bos": "<|begin_of_text|>",
        "adds_bos": True,
    },
    "gemma2": {"special": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "eos": "<eos>", "bos": "<bos>", "adds_bos": True},
    "mistral_v02": {"special": ("<s>", "</s>"), "eos": "</s>", "bos": "<s>", "adds_bos": True},
    "mistral_v03": {"special": ("<s>", "</s>", "[INST]", "[/INST]"), "eos": "</s>", "bos": "<s>", "adds_bos": True},
}  # fmt: skip
TERMINATORS = {
    "llama3": "<|eot_id|>",
    "gemma2": "<end_of_turn>",
    "phi3": "<|end|>",
    "mistral_v02": "</s>",
    "mistral_v03": "</s>",
}
WITHOUT_SYSTEM = {"gemma2": "system_unsupported", "mistral_v02": "system_unsupported"}
TALK = (
    Message("user", "Hello there"),
    Message("assistant", "How can I help you?"),
    Message("user", "What is 6 x 7?"),
    Message("assistant", "The answer is 42."),
)


def make(name):
    tokenizer = bpe_tokenizer(**STUBS[name])
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    return tokenizer, Encoder(tokenizer, "auto")


def as_dicts(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def supervised_text(tokenizer, encoded):
    return [tokenizer.decode(encoded.input_ids[answer.start : answer.end]) for answer in encoded.answers]


@pytest.mark.parametrize("name", STUBS)
def test_only_answers_and_terminators_are_supervised(name):
    tokenizer, encoder = make(name)
    encoded = encoder.encode(Conversation(TALK if name != "qwen3" else (*TALK[:1], *TALK[3:])))
    stop = TERMINATORS.get(name, "<|im_end|>")
    # Two templates write more before the answer, which the prompt lacks and the model must write itself.
    opening = {"qwen3": "<think>\n\n</think>\n\n", "mistral_v03": " "}.get(name, "")
    first = " " if name == "mistral_v03" else ""
    last = f"{opening}The answer is 42.{stop}"
    assert (
        supervised_text(tokenizer, encoded) == [last]
        if name == "qwen3"
        else [f"{first}How can I help you?{stop}", last]
    )
    inside = {i for answer in encoded.answers for i in range(answer.start, answer.end)}
    assert [label >= 0 for label in encoded.labels] == [i in inside for i in range(len(encoded.labels))]
    assert encoder.stop_token_ids == (tokenizer.convert_tokens_to_ids(stop),)


@pytest.mark.parametrize("name", STUBS)
def test_ids_are_the_tokenizers_own_on_the_rendered_text(name):
    tokenizer, encoder = make(name)
    text = tokenizer.apply_chat_template(as_dicts(TALK), tokenize=False)
    assert encoder.encode(Conversation(TALK)).input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", STUBS)
def test_the_prompt_is_what_apply_chat_template_sends_and_opens_the_training_row(name):
    tokenizer, encoder = make(name)
    prompt = encoder.encode_prompt(TALK[:3])
    assert prompt == tokenizer.apply_chat_template(as_dicts(TALK[:3]), add_generation_prompt=True)["input_ids"]
    assert encoder.encode(Conversation(TALK)).input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", STUBS)
def test_a_system_prompt_is_rendered_or_refused_by_name(name):
    tokenizer, encoder = make(name)
    conversation = Conversation((Message("system", "Be brief & kind."), *TALK))
    if name in WITHOUT_SYSTEM:
        with pytest.raises(RefusedError) as caught:
            encoder.encode(conversation)
        assert caught.value.reason == WITHOUT_SYSTEM[name]
    elif name == "mistral_v03":
        # It puts the system prompt before the last message only if that is the user's: in training it is dropped.
        with pytest.raises(RefusedError) as caught:
            encoder.encode(conversation)
        assert caught.value.reason == "system_dropped"
    else:
        assert "Be brief & kind." in tokenizer.decode(encoder.encode(conversation).input_ids)


def test_an_earlier_answer_that_loses_its_reasoning_is_not_supervised_in_the_history():
    tokenizer, encoder = make("qwen3")
    thinking = "<think>\nSix times seven.\n</think>\n\nThe answer is 42."
    last = encoder.encode(Conversation((*TALK[:3], Message("assistant", thinking))))
    assert supervised_text(tokenizer, last)[1] == f"{thinking}<|im_end|>"
    assert [answer.supervised for answer in last.answers] == [False, True]  # the first lacks its empty <think> block
    assert last.left_out == 1
    assert not last.findings
    earlier = encoder.encode(Conversation((TALK[0], Message("assistant", thinking), *TALK[2:])))
    assert supervised_text(tokenizer, earlier)[0] == "The answer is 42.<|im_end|>"
    assert [answer.supervised for answer in earlier.answers] == [False, True]
    assert earlier.left_out == 1


def test_calls_are_supervised_and_tool_results_are_not():
    tokenizer, encoder = make("qwen25")
    call = Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 6, "b": 7}'),))
    conversation = Conversation((TALK[0], call, Message("tool", "13 <tool_call>"), TALK[3]), tools='[{"name": "add"}]')
    encoded = encoder.encode(conversation)
    assert supervised_text(tokenizer, encoded) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 6, "b": 7}}\n</tool_call><|im_end|>',
        "The answer is 42.<|im_end|>",
    ]
    learned = tokenizer.decode([label for label in encoded.labels if label >= 0])
    assert "13" not in learned
    marker = tokenizer.convert_tokens_to_ids("<tool_call>")
    written_by_template = 2 + 1  # the tools' introduction and the call; what the tool's result spells is text
    assert encoded.input_ids.count(marker) == written_by_template
    assert "spells_control" in encoded.findings


def test_a_template_that_trims_is_found_out():
    _, encoder = make("llama3")
    encoded = encoder.encode(Conversation((Message("user", "  Hello \n"), Message("assistant", "Yes. "))))
    assert encoded.findings == ("trimmed",)
    assert encoded.answers[0].text == "Yes."


REFUSALS = {
    "user_dropped": "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "user_repeated": "{% for m in messages %}<|im_start|>{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}",
    "content_rewritten": "{% for m in messages %}<|im_start|>{{ m.content | replace('42', '43') }}<|im_end|>{% endfor %}",
    "template_refuses": "{% for m in messages %}{% if loop.index > 3 %}{{ raise_exception('too long') }}{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    "no_terminator": "{% for m in messages %}<|im_start|>{{ m.content }}{% if loop.index < 4 %}<|im_end|>{% endif %}{% endfor %}",
    "prompt_not_prefix": "{% for m in messages %}<|im_start|>{{ messages | length }}{{ m.content }}<|im_end|>{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_template_that_cannot_carry_a_conversation_is_refused_by_name(reason):
    tokenizer = bpe_tokenizer(**STUBS["smollm2"])
    encoder_of = REFUSALS[reason]
    with pytest.raises(RefusedError) as caught:
        Encoder(tokenizer, encoder_of).encode(Conversation(TALK))
    assert caught.value.reason == reason
