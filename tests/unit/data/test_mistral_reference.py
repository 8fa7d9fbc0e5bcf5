"""The Mistral templates against mistral-common, the independent reference."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.conversation import Conversation, Message
from minisft.data.encoder import Encoder
from minisft.data.formats import RowError, to_conversation
from tests.unit.data.mistral import fast_tokenizer, reference_ids, reference_labels, reference_prompt

VERSIONS = ("v1", "v3")
CONTROLS = ["[INST]", "[/INST]", "<s>", "</s>", "<unk>", "[TOOL_CALLS]", "[control_8]", "▁", "  ", "\n", "☺"]

pieces = st.one_of(
    st.text(min_size=1, max_size=20), st.sampled_from(CONTROLS), st.sampled_from(["Hello", " so ", "42."])
)
texts = st.lists(pieces, max_size=6).map("".join)
answers = texts.filter(lambda text: text != "")
exchanges = st.lists(st.tuples(texts, answers), min_size=1, max_size=8)
systems = st.one_of(st.none(), texts)


def turns(system, pairs):
    opening = [] if system is None else [("system", system)]
    return opening + [turn for user, answer in pairs for turn in (("user", user), ("assistant", answer))]


def as_conversation(messages):
    return Conversation(tuple(Message(role, content) for role, content in messages))


def assert_like_reference(version, messages):
    tokenizer = fast_tokenizer(version)
    encoder = encoder_of(version)
    ids = reference_ids(version, messages)
    encoded = encoder.encode(as_conversation(messages))
    assert encoded.input_ids == ids, tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert encoded.labels == reference_labels(version, messages, ids)
    prompt = encoder.encode_prompt([Message(role, content) for role, content in messages[:-1]])
    assert prompt == reference_prompt(version, messages[:-1])
    assert ids[: len(prompt)] == prompt


_ENCODERS: dict[str, Encoder] = {}


def encoder_of(version):
    if version not in _ENCODERS:
        _ENCODERS[version] = Encoder(fast_tokenizer(version), f"mistral-{version}")
    return _ENCODERS[version]


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=150)
@given(system=systems, pairs=exchanges)
def test_ids_and_labels_are_those_of_mistral_common(version, system, pairs):
    assert_like_reference(version, turns(system, pairs))


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=2500)
@given(system=systems, pairs=exchanges)
def test_ids_and_labels_are_those_of_mistral_common_in_thousands_of_cases(version, system, pairs):
    assert_like_reference(version, turns(system, pairs))


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=60)
@given(roles=st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=8), text=answers)
def test_same_role_runs_are_joined_as_mistral_common_joins_them(version, roles, text):
    messages = [("user", text), *((role, f"{text}{i}") for i, role in enumerate(roles)), ("assistant", "end")]
    ids = reference_ids(version, messages)
    assert encoder_of(version).encode(as_conversation(messages)).input_ids == ids


@pytest.mark.parametrize("version", VERSIONS)
def test_questions_with_a_system_prompt_between_them_are_turns_of_their_own(version):
    messages = [("user", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")]
    assert encoder_of(version).encode(as_conversation(messages)).input_ids == reference_ids(version, messages)


@pytest.mark.parametrize("version", VERSIONS)
def test_mistral_picks_the_version_that_the_tokenizer_is_made_for(version):
    assert Encoder(fast_tokenizer(version), "mistral").template_name == f"mistral-{version}"


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "name", ["oasst/en_all_paths.sharegpt.jsonl", "taskmaster4/tm4_all.sharegpt.jsonl", "bench_mix.sharegpt.jsonl"]
)
def test_complete_data_sets_have_the_ids_of_mistral_common(version, name, test_data):
    compared = 0
    for number, line in enumerate((test_data / name).read_text().splitlines()):
        try:
            conversation = to_conversation(json.loads(line), str(number), "sharegpt")
        except RowError:
            continue
        messages = [(message.role, message.content) for message in conversation.messages]
        if any(role == "tool" for role, _ in messages) or any(m.tool_calls for m in conversation.messages):
            continue
        try:
            ids = reference_ids(version, messages)
        except Exception:  # mistral-common's own refusal: the conversation is not one to compare
            continue
        encoded = encoder_of(version).encode(Conversation(conversation.messages))
        assert encoded.input_ids == ids, f"{name}:{number + 1}"
        assert has_runs(messages) or encoded.labels == reference_labels(version, messages, ids), number
        compared += 1
    assert compared > 400


def has_runs(messages):
    return any(a[0] == b[0] for a, b in pairwise(messages))
