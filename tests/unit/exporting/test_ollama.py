"""The Modelfile: its template, executed by Go's own text/template, renders the text of the trained template."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisft.data.conversation import Conversation, Message
from minisft.data.encoder import Encoder
from minisft.errors import UserError
from minisft.exporting.gguf_vocabulary import probe_prompt
from minisft.exporting.ollama import find_form, go_template, modelfile
from tests.unit.data import mistral
from tests.unit.data.toys import bpe_tokenizer

PROGRAM = Path(__file__).parents[2] / "go_template" / "main.go"
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def tokenizer_of(name):
    if name.startswith("mistral-v"):
        return mistral.fast_tokenizer({"mistral-v1": "v1", "mistral-v3": "v3", "mistral-v7": "v7"}[name])
    return {
        "mistral-tekken": lambda: mistral.fast_tokenizer("tekken-v3"),
        "mistral-text": lambda: bpe_tokenizer(("<s>", "</s>"), "</s>", "<s>"),
        "chatml": lambda: bpe_tokenizer(("<s>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<s>"),
        "smollm2": lambda: bpe_tokenizer(("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_start|>"),
        "llama3": lambda: bpe_tokenizer(LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
        "zephyr": lambda: bpe_tokenizer(("<s>", "</s>"), "</s>", "<s>"),
    }[name]()


TEMPLATES = {
    "mistral-v1": "mistral-v1",
    "mistral-v3": "mistral-v3",
    "mistral-v7": "mistral-v7",
    "mistral-tekken": "mistral-v3",
    "mistral-text": "mistral",
    "chatml": "chatml",
    "smollm2": SMOLLM2,
    "llama3": "llama3",
    "zephyr": "zephyr",
}
EXACT = ("mistral-tekken", "mistral-text", "chatml", "smollm2", "llama3", "zephyr")  # decoding gives the text back


@pytest.fixture(scope="module")
def go_program(tmp_path_factory):
    """Return the path of the compiled Go program, or skip: there is no Go here."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed, which executes the Modelfile's template")
    program = tmp_path_factory.mktemp("go") / "go_template"
    subprocess.run(["go", "build", "-o", program, PROGRAM], check=True, capture_output=True, cwd=PROGRAM.parent)
    return program


def execute(program, template, conversations):
    rows = [[{"Role": role, "Content": text} for role, text in turns] for turns in conversations]
    data = json.dumps({"template": template, "conversations": rows})
    done = subprocess.run([program], input=data, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def template_of(text):
    """Read the template from a Modelfile as Ollama does: everything between the triple quotes."""
    found = re.fullmatch(r'FROM \./model\.gguf\nTEMPLATE """(.*?)"""\n((?:PARAMETER .*\n)+)', text, re.DOTALL)
    assert found, text
    return found[1]


# Texts with what templates and quotes are made of. White space at the ends is ASCII, and single: see the module.
PIECES = (
    "{{",
    "}}",
    '"""',
    "'",
    "\\n",
    "{% if %}",
    "{{- .Content -}}",
    "é",
    "🙂",
    "\n",
    "\n\n",
    " ",
    "\t",
    "a",
    "two words",
)
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)
free = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)


@st.composite
def conversations(draw):
    turns = [("system", draw(texts | free))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        turns += [("user", draw(texts | free)), ("assistant", draw(texts | free))]
    return [*turns, ("user", draw(texts | free))] if draw(st.booleans()) or len(turns) < 2 else turns


def ids_of(encoder, turns):
    messages = tuple(Message(role, text) for role, text in turns)
    return (
        encoder.encode_prompt(messages) if turns[-1][0] == "user" else encoder.encode(Conversation(messages)).input_ids
    )


def rendered_by_ours(encoder, turns):
    """The text of our Jinja template, and that of our ids."""
    tokenizer = encoder.tokenizer
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(
        messages, chat_template=encoder.chat_template, tokenize=False, add_generation_prompt=turns[-1][0] == "user"
    )
    return text, tokenizer.decode(ids_of(encoder, turns))


@pytest.mark.parametrize("name", TEMPLATES)
def test_200_conversations_are_the_trained_text(go_program, name):
    encoder = Encoder(tokenizer_of(name), TEMPLATES[name])
    stops = encoder.stop_token_ids
    template = template_of(modelfile(encoder.tokenizer, encoder.chat_template, stop_ids=stops, num_ctx=512))
    bos = encoder.tokenizer.bos_token if probe_prompt(encoder.tokenizer, encoder.chat_template)[1] else ""
    rows = []

    @settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations())
    def collect(turns):
        rows.append(turns)

    collect()
    assert len(rows) >= 200
    found = execute(go_program, template, rows)
    for turns, text in zip(rows, found, strict=True):
        jinja, decoded = rendered_by_ours(encoder, turns)
        assert text == jinja.removeprefix(bos), turns
        if name in EXACT:
            assert text == decoded.removeprefix(bos), turns


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_the_text_has_the_ids_that_were_trained(go_program, name):
    encoder = Encoder(tokenizer_of(name), TEMPLATES[name])
    turns = [("system", "be brief"), ("user", "one two"), ("assistant", "three"), ("user", "four")]
    template = go_template(encoder.tokenizer, encoder.chat_template)
    (text,) = execute(go_program, template, [turns])
    ids = encoder.tokenizer.encode(text, add_special_tokens=False)
    assert [encoder.tokenizer.bos_token_id, *ids] == ids_of(encoder, turns)


def test_a_planted_fault_is_seen(go_program):
    encoder = Encoder(tokenizer_of("smollm2"), SMOLLM2)
    template = go_template(encoder.tokenizer, SMOLLM2)
    turns = [("user", "one")]
    (right,) = execute(go_program, template, [turns])
    assert right == rendered_by_ours(encoder, turns)[0]
    for wrong in (
        template.replace("SmolLM", "Smol"),
        template.replace("assistant\\n", "assistant"),
        template.replace("{{- .Content }}", ""),
    ):
        assert execute(go_program, wrong, [turns]) != [right]


def test_results_of_tools_are_turns_where_the_template_has_them(go_program):
    encoder = Encoder(tokenizer_of("llama3"), "llama3")
    turns = [("user", "a"), ("assistant", "b"), ("tool", "c"), ("user", "d")]
    (text,) = execute(go_program, go_template(encoder.tokenizer, encoder.chat_template), [turns])
    assert "<|start_header_id|>ipython<|end_header_id|>\n\nc<|eot_id|>" in text
    assert text == rendered_by_ours(encoder, turns)[0].removeprefix("<|begin_of_text|>")


# --- the Modelfile ----------------------------------------------------------------------------------------


def test_the_modelfile_has_the_stop_tokens_and_greedy_decoding():
    encoder = Encoder(tokenizer_of("llama3"), "llama3")
    ids = [encoder.tokenizer.get_vocab()[name] for name in ("<|eot_id|>", "<|end_header_id|>", "<|eot_id|>")]
    text = modelfile(encoder.tokenizer, encoder.chat_template, stop_ids=ids, num_ctx=2048)
    template_of(text)
    assert text.splitlines()[-5:] == [
        'PARAMETER stop "<|eot_id|>"',
        'PARAMETER stop "<|end_header_id|>"',
        "PARAMETER num_ctx 2048",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.0",
    ]


def test_an_adapter_is_named():
    encoder = Encoder(tokenizer_of("chatml"), "chatml")
    text = modelfile(encoder.tokenizer, encoder.chat_template, stop_ids=[], num_ctx=8, adapter="./adapter.gguf")
    assert text.startswith('FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """')


def test_a_bos_that_the_engine_adds_is_left_out_and_a_marker_is_not():
    llama3, smollm2 = (Encoder(tokenizer_of(name), TEMPLATES[name]) for name in ("llama3", "smollm2"))
    assert "<|begin_of_text|>" not in go_template(llama3.tokenizer, llama3.chat_template)
    assert go_template(smollm2.tokenizer, SMOLLM2).count("<|im_start|>") == 6


def test_a_text_cannot_end_the_quotes():
    tokenizer = tokenizer_of("smollm2")
    default = 'He said """go""" and {{ .Content }}'
    quotes = SMOLLM2.replace("You are a helpful AI assistant named SmolLM, trained by Hugging Face", default)
    assert find_form(tokenizer, quotes).default == default
    assert '"""' not in go_template(tokenizer, quotes)


@pytest.mark.parametrize(
    "template",
    [
        SMOLLM2.replace("message['content']", "message['content'] | upper"),
        SMOLLM2.replace("{% for", "{{ 'Today is ' + strftime_now('%A') }}{% for", 1),
        SMOLLM2.replace("'<|im_end|>'", "('<|im_end|>' if loop.index0 else '<|end|>')"),
        SMOLLM2.replace("message['content']", "message['content'].split('</think>')[-1]"),
        "{{ raise_exception('never') }}",
        "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ],
)
def test_a_template_without_a_go_form_is_refused(template):
    with pytest.raises(UserError, match="no Go form of this template is known") as error:
        go_template(tokenizer_of("smollm2"), template)
    assert "--to gguf" in error.value.fix
