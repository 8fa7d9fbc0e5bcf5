"""Which Mistral form a tokenizer gets, and folders with `tekken.json`: the ids of mistral-common, or a refusal by name."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from minisft.data.conversation import Conversation, Message, ToolCall
from minisft.data.encoder import Encoder
from minisft.data.fingerprint import tokenizer_hash
from minisft.data.unrolling import unroll
from minisft.errors import UserError
from minisft.models import MISTRAL_VERSION, load_tokenizer, resolve_model
from tests.unit.data.mistral import fast_tokenizer, model_file, reference, tekken_file

CALL = Message("assistant", "", tool_calls=(ToolCall("menu", "{}", "call00001"),))
RESULT = Message("tool", "tea", name="menu", call_id="call00001")
TALK = (Message("user", "Hello"), CALL, RESULT, Message("assistant", "Tea."))


@pytest.fixture
def tekken_folder(tmp_path):
    def make(version):
        shutil.copy(tekken_file(version), tmp_path / "tekken.json")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("kind", "form"),
    [("v1", "mistral-v1"), ("v2", "mistral-v3"), ("v3", "mistral-v3"), ("v7", "mistral-v7"), ("v7m1", "mistral-v7")],
)
def test_mistral_is_the_form_that_the_control_tokens_tell(kind, form):
    assert Encoder(fast_tokenizer(kind), "mistral").template_name == form


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
@pytest.mark.parametrize("template", ["mistral", "auto"])
def test_mistral_is_the_form_that_tekken_json_states(version, template, tekken_folder):
    tokenizer = load_tokenizer(tekken_folder(version))
    assert tokenizer.init_kwargs[MISTRAL_VERSION] == version
    assert Encoder(tokenizer, template).template_name == f"mistral-{version}"


def test_a_sentencepiece_model_states_its_version_in_its_name(tmp_path):
    fast_tokenizer("v2").save_pretrained(tmp_path)
    shutil.copy(model_file("v2"), tmp_path / "tokenizer.model.v2")
    assert Encoder(load_tokenizer(tmp_path), "mistral").template_name == "mistral-v2"


@pytest.mark.parametrize(
    ("kind", "named", "problem", "fix"),
    [
        ("tekken-v7", "mistral", "do not tell whether it is mistral-v3 or mistral-v7", "data.template: mistral-v3 or mistral-v7"),
        ("tekken-v13", "mistral", "do not tell whether it is mistral-v11 or mistral-v13", "mistral-v11 or mistral-v13"),
        ("tekken-v15", "mistral", "of Mistral's v15, and only the forms v1, v2, v3, v7, v11, v13", ".jinja file"),
        ("tekken-v15", "mistral-v13", "of Mistral's v15", ".jinja file"),
        ("v3", "mistral-v7", "mistral-v7 needs a tokenizer with the control tokens .* lacks .SYSTEM_PROMPT", "template: mistral,"),
        ("v7", "mistral-v3", "this tokenizer is of mistral-v7, and mistral-v3 is another form", "data.template: mistral,"),
        ("v7", "mistral-v11", "this one lacks .CALL_ID., .ARGS.", "data.template: mistral,"),
        ("v3", "mistral-v2", "of mistral-v3, and mistral-v2 is another form", "data.template: mistral,"),
        ("tekken-v13", "mistral-v7", "of mistral-v11 or mistral-v13, and mistral-v7 is another form", "mistral-v11 or mistral-v13"),
        ("v1", "mistral-v2", "mistral-v2 needs a tokenizer with the control tokens .INST.", "data.template: mistral,"),
    ],
)  # fmt: skip
def test_a_form_that_the_tokenizer_has_not_is_refused_by_name(kind, named, problem, fix):
    with pytest.raises(UserError, match=problem) as refusal:
        Encoder(fast_tokenizer(kind), named)
    assert refusal.value.where == "data.template"
    assert fix in refusal.value.fix


def test_a_stated_version_is_the_only_one(tekken_folder):
    tokenizer = load_tokenizer(tekken_folder("v13"))
    with pytest.raises(UserError, match="this tokenizer is of mistral-v13, and mistral-v11 is another form"):
        Encoder(tokenizer, "mistral-v11")


def test_a_version_that_is_not_implemented_is_refused_by_its_name(tekken_folder):
    tokenizer = load_tokenizer(tekken_folder("v15"))
    for template in ("auto", "mistral", "mistral-v13"):
        with pytest.raises(UserError, match="Mistral's v15"):
            Encoder(tokenizer, template)
    assert Encoder(tokenizer, "chatml").template_name == "chatml"


def test_rows_with_tools_are_counted_where_v3_is_assumed():
    for template, findings in (("mistral", ("version_assumed",)), ("mistral-v3", ())):
        assert Encoder(fast_tokenizer("v2"), template).encode(Conversation(TALK)).findings == findings
    assert not Encoder(fast_tokenizer("v2"), "mistral").encode(Conversation((TALK[0], TALK[3]))).findings
    assert not Encoder(fast_tokenizer("v3"), "mistral").encode(Conversation(TALK)).findings


def test_an_earlier_call_is_learned_in_a_row_of_its_own_in_v2():
    encoder = Encoder(fast_tokenizer("v2"), "mistral-v2")
    conversation = Conversation((*TALK, Message("user", "More"), Message("assistant", "No.")))
    encoded = encoder.encode(conversation)
    assert encoded.left_out == 1
    assert "earlier_calls_left_out" in encoded.findings
    assert "[TOOL_CALLS]" not in encoder.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    rows = unroll(conversation, encoder.render(conversation), encoder.render, "auto")
    assert len(rows) == sum(message.is_answer for message in conversation.messages)
    first = encoder.encode_rendered([rows[0].rendered], [rows[0].conversation])[0]
    assert "[TOOL_CALLS]" in encoder.tokenizer.convert_ids_to_tokens([label for label in first.labels if label >= 0])


def test_tools_that_no_user_turn_carries_are_counted():
    messages = (Message("system", "Be brief."), Message("assistant", "Hello."))
    encoded = Encoder(fast_tokenizer("v7"), "mistral-v7").encode(Conversation(messages, tools='[{"name": "menu"}]'))
    assert encoded.findings == ("tools_left_out",)


@cache
def loaded(kind):
    """A folder with only tekken.json, loaded: mistral-common's own file (v3), or a part of it as another version."""
    folder = Path(tempfile.mkdtemp())
    shutil.copy(model_file(kind), folder / "tekken.json")
    return Encoder(load_tokenizer(folder), "mistral")


pieces = st.sampled_from(["Hello", "  ", "\n", "'S", "123456", "É", "한국", "🙂", "\u0301", "[INST]"])


@pytest.mark.parametrize("kind", ["tekken-v3", "tekken-v13"])
@settings(max_examples=150)
@given(text=st.text(max_size=40) | st.lists(pieces, max_size=8).map("".join))
def test_a_tekken_file_gives_the_ids_of_mistral_common(kind, text):
    core = reference(kind).instruct_tokenizer.tokenizer
    prompt = loaded(kind).encode_prompt([Message("user", text)])
    assert prompt[2:-1] == core.encode(text, bos=False, eos=False)


def test_a_saved_tokenizer_loads_with_its_ids_and_version(tekken_folder, tmp_path):
    tokenizer = load_tokenizer(tekken_folder("v13"))
    encoder = Encoder(tokenizer, "auto")
    tokenizer.chat_template = encoder.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model" / "tokenizer_config.json").read_text()
    ids = encoder.encode(Conversation(TALK)).input_ids
    for template in ("auto", "mistral"):
        assert Encoder(load_tokenizer(tmp_path / "model"), template).encode(Conversation(TALK)).input_ids == ids
    plain: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    expected = encoder.encode(Conversation((Message("user", "Hello"), Message("assistant", "Hi.")))).input_ids
    assert plain.apply_chat_template(rows)["input_ids"] == expected


def test_the_template_of_a_tekken_folder_is_its_own(tekken_folder):
    folder = tekken_folder("v13")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[INST]{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    )
    assert load_tokenizer(folder).chat_template.startswith("{% for m")


def test_the_version_makes_it_another_tokenizer(tekken_folder):
    tokenizer = load_tokenizer(tekken_folder("v7"))
    before = tokenizer_hash(tokenizer, None)
    tokenizer.init_kwargs[MISTRAL_VERSION] = "v3"
    assert tokenizer_hash(tokenizer, None) != before


def wrong_pattern(folder):
    """Write a tokenizer.json beside tekken.json that splits texts at spaces only, and return it."""
    tokenizer = load_tokenizer(folder)
    split = pre_tokenizers.Split(Regex(r" "), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def test_the_saved_text_of_another_form_is_a_jinja_text_like_others():
    v3 = Encoder(fast_tokenizer("v3"), "mistral-v3").chat_template
    assert Encoder(fast_tokenizer("v7"), v3).template_name == "jinja"


def test_a_tokenizer_json_that_splits_otherwise_gives_way_to_tekken_json(tekken_folder, capsys):
    folder = tekken_folder("v7")
    right = load_tokenizer(folder).encode("12 tea's")
    wrong = wrong_pattern(folder)
    assert wrong.encode("12 tea's") != right
    wrong.save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert loaded.encode("12 tea's") == right
    assert loaded.chat_template == "{{ messages }}"
    assert "tokenizer.json splits texts in another way than tekken.json" in capsys.readouterr().err
    # With other tokens, neither is known to be right.
    wrong.add_tokens(["<extra>"])
    wrong.save_pretrained(folder)
    with pytest.raises(UserError, match=r"its tokenizer.json and tekken.json split texts in different ways"):
        load_tokenizer(folder)


def test_a_tokenizer_json_that_splits_alike_is_used(tekken_folder, capsys):
    folder = tekken_folder("v7")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert "<extra>" in loaded.get_vocab()
    assert loaded.init_kwargs[MISTRAL_VERSION] == "v7"
    assert not capsys.readouterr().err


def test_a_damaged_tekken_file_is_refused(tekken_folder):
    folder = tekken_folder("v7")
    content = json.loads((folder / "tekken.json").read_text())
    del content["config"]["pattern"]
    (folder / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_a_folder_with_only_tekken_json_is_a_model_folder(tekken_folder):
    folder = tekken_folder("v7")
    assert resolve_model(str(folder), weights=False).folder == folder.resolve()
