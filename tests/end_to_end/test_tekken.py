"""A model folder whose tokenizer is Mistral's `tekken.json` alone, through the command line."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from tests.command import refused, run
from tests.unit.data.mistral import tekken_file

CALL = {"id": "call00001", "type": "function", "function": {"name": "menu", "arguments": '{"size": "small"}'}}
TOOLS = [{"type": "function", "function": {"name": "menu", "description": "", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A function that makes a tiny Mistral model with a tekken tokenizer of one version."""
    folder = tmp_path_factory.mktemp("tekken")
    config = MistralConfig(
        vocab_size=3040, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder / "weights")

    def make(version):
        shutil.copytree(folder / "weights", folder / version, dirs_exist_ok=True)
        shutil.copy(tekken_file(version), folder / version / "tekken.json")
        return folder / version

    return make


@pytest.fixture
def recipe(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Number {i}?"},
                {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]},
                {"role": "tool", "content": "tea", "tool_call_id": "call00001"},
                {"role": "assistant", "content": f"Tea {i}."},
                {"role": "user", "content": "Thanks."},
                {"role": "assistant", "content": "You are welcome."},
            ],
            "tools": TOOLS,
        }
        for i in range(8)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(folder, template):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {folder}\noutput: {tmp_path / 'run'}\n"
            f"data: {{source: {tmp_path / 'talks.jsonl'}, template: {template}, test_fraction: 0.25}}\n"
            "training: {max_steps: 1, batch_size: 2, precision: fp32}\nevaluation: {max_new_tokens: 4}\n"
        )
        return path

    return write


def test_a_run_saves_the_form_and_the_ids(model, recipe, tmp_path, capsys):
    path = recipe(model("v13"), "auto")
    status, _, err = run(capsys, "train", path)
    assert status == 0, err
    ledger = json.loads((tmp_path / "run" / "dataset" / "ledger.json").read_text())
    assert ledger["template"] == "mistral-v13"
    assert not ledger["findings"]
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.chat_template.startswith("{# minisft: mistral-v13 #}")
    assert saved.encode("tea", add_special_tokens=False)
    _, out, _ = run(capsys, "inspect", path, "--count", "1")
    assert "[TOOL_CALLS]menu[ARGS]" in out


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_prompts_at_inference_and_the_saved_text_are_those_trained(version, model, recipe, capsys):
    status, out, err = run(capsys, "check", recipe(model(version), "mistral"), "--quick")
    assert status == 0, out + err
    assert f"mistral-{version}; answers end with" in " ".join(out.split())


@pytest.mark.parametrize(
    ("version", "template", "problem"),
    [
        ("v15", "mistral", "this tokenizer is of Mistral's v15, and only the forms v1, v2, v3, v7, v11, v13"),
        ("v7", "mistral-v3", "this tokenizer is of mistral-v7, and mistral-v3 is another form"),
        ("v7", "mistral-v13", "mistral-v13 needs a tokenizer with the control tokens"),
    ],
)
def test_a_form_that_the_tokenizer_has_not_is_refused(version, template, problem, model, recipe, capsys):
    err = refused(capsys, "prepare", recipe(model(version), template))
    assert problem in " ".join(err.split())
