"""Data and templates that are broken in one way each: the check for it is the first to fail."""

import json
import shutil

import numpy as np
import pytest

from minisft.data.encoder import Encoder
from tests.tiny import byte_tokenizer
from tests.unit.checking.examined import assert_first_to_fail, context_with_encoder, depending_on, examined

TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


@pytest.fixture
def with_template(recipe_file, tmp_path):
    """Return a function that examines the recipe, quickly, under a Jinja template."""

    def run_checks(text, *overrides):
        path = tmp_path / "template.jinja"
        path.write_text(text, encoding="utf-8")
        return examined(recipe_file, f"data.template={path}", *overrides, quick=True)

    return run_checks


@pytest.fixture
def with_system(tmp_path):
    """Return a file of talks that begin with a system prompt."""
    path = tmp_path / "system.jsonl"
    turns = [("system", "Be brief."), ("human", "tea?"), ("gpt", "yes"), ("human", "hot?"), ("gpt", "no")]
    with path.open("w", encoding="utf-8") as file:
        for number in range(20):
            talk = [{"from": role, "value": f"{text} {number}"} for role, text in turns]
            file.write(json.dumps({"conversations": talk}) + "\n")
    return path


def test_a_quick_check_passes_on_an_intact_template_and_runs_nothing_that_needs_weights(with_template):
    results = with_template(TURNS + PROMPT)
    assert {result.status for name, result in results.items() if name.startswith(("data.", "serve."))} == {"ok"}
    others = [result for name, result in results.items() if not name.startswith(("data.", "serve."))]
    assert {(result.status, result.detail) for result in others} == {("not run", "because --quick loads no weights")}


def test_a_source_that_is_no_conversations(recipe_file, tmp_path):
    source = tmp_path / "prose.jsonl"
    source.write_text("once upon a time\n", encoding="utf-8")
    detail = assert_first_to_fail(examined(recipe_file, f"data.source={source}", quick=True), "data.source")
    assert "prose.jsonl:1" in detail


def test_prepared_rows_of_another_source(recipe_file, conversations, tmp_path):
    """The dataset folder has the rows of another run, and its own ledger."""
    other = tmp_path / "other.jsonl"
    other.write_text(conversations.read_text().replace("talk-", "walk-"), encoding="utf-8")
    own_output, foreign_output = f"output={tmp_path / 'own'}", f"output={tmp_path / 'foreign'}"
    examined(recipe_file, own_output, quick=True)
    examined(recipe_file, foreign_output, f"data.source={other}", quick=True)
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "own/dataset" / split)
        shutil.copytree(tmp_path / "foreign/dataset" / split, tmp_path / "own/dataset" / split)
    detail = assert_first_to_fail(examined(recipe_file, own_output, quick=True), "data.rows")
    assert "no row of the source" in detail


def test_a_template_that_drops_the_system_prompt(with_template, with_system):
    drops = TURNS.replace("messages %}", "messages if m['role'] != 'system' %}")
    detail = assert_first_to_fail(with_template(drops + PROMPT, f"data.source={with_system}"), "data.system")
    assert "system" in detail


@pytest.mark.parametrize("invalid", ["skip", "repair"])
def test_rows_that_are_skipped_for_their_system_prompt_are_no_success(
    with_template, with_system, conversations, invalid
):
    both = with_system.with_name("both.jsonl")
    both.write_text(with_system.read_text() + conversations.read_text(), encoding="utf-8")
    drops = TURNS.replace("messages %}", "messages if m['role'] != 'system' %}")
    detail = assert_first_to_fail(
        with_template(drops + PROMPT, f"data.source={both}", f"data.invalid={invalid}"), "data.system"
    )
    assert "20" in detail


def test_a_terminator_that_is_masked_as_padding(recipe_file):
    class MasksTerminators(Encoder):
        def encode_rendered(self, rendered, conversations):
            batch = super().encode_rendered(rendered, conversations)
            batch.labels[np.isin(batch.ids, self.stop_token_ids)] = -100
            return batch

    results = examined(recipe_file, quick=True, context=context_with_encoder(MasksTerminators))
    assert "learned terminators" in assert_first_to_fail(results, "data.terminators")
    assert {"data.answers", "serve.prompts", "loss.mask", "learning.recall"} <= depending_on("data.terminators")


def test_a_template_that_ends_no_answer(with_template):
    endless = TURNS.replace(" + eos_token", " + '\\n'")
    detail = assert_first_to_fail(with_template(endless + PROMPT), "data.template")
    assert "end" in detail


def test_labels_that_are_overwritten_with_the_ids(recipe_file):
    class LearnsAll(Encoder):
        def encode_rendered(self, rendered, conversations):
            batch = super().encode_rendered(rendered, conversations)
            batch.labels[:] = batch.ids
            return batch

    results = examined(recipe_file, quick=True, context=context_with_encoder(LearnsAll))
    assert_first_to_fail(results, "data.answers")
    assert not (
        recipe_file.parent / "run" / "dataset"
    ).exists()  # a data set with wrong labels is not where training reads it


def test_bos_twice(with_template):
    assert "twice" in assert_first_to_fail(with_template("{{ bos_token + bos_token }}" + TURNS + PROMPT), "data.bos")


def test_text_that_becomes_a_control_token(recipe_file, tiny_model, tmp_path):
    """A tokenizer whose merges spell the control token, letter by letter."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    byte_tokenizer().save_pretrained(model)
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = vocabulary | {"</": len(vocabulary), "</s": len(vocabulary) + 1}
    tokenizer["pre_tokenizer"]["use_regex"] = False  # it would separate the letter from the brackets
    tokenizer["model"]["merges"] = [["<", "/"], ["</", "s"], ["</s", ">"]]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    results = examined(recipe_file, f"model={model}", quick=True)
    assert "became a control token" in assert_first_to_fail(results, "data.control")


def test_rows_on_disk_that_lost_tokens(recipe_file, tmp_path):
    import datasets

    examined(recipe_file, quick=True)
    folder, temporary = tmp_path / "run" / "dataset" / "train", tmp_path / "temporary"
    rows = datasets.load_from_disk(str(folder)).map(
        lambda row: {name: row[name][:-1] for name in ("input_ids", "labels")}
    )
    rows.save_to_disk(str(temporary))
    shutil.rmtree(folder)
    temporary.rename(folder)
    assert "in the ledger" in assert_first_to_fail(examined(recipe_file, quick=True), "data.tokens")


def test_test_rows_that_are_train_rows(recipe_file, conversations, tmp_path):
    copy = tmp_path / "test.jsonl"
    copy.write_text("".join(conversations.read_text().splitlines(keepends=True)[:3]), encoding="utf-8")
    results = examined(recipe_file, f"data.test={copy}", quick=True)
    assert "3 test rows" in assert_first_to_fail(results, "data.split")


def test_a_length_that_cuts_most_of_the_data(recipe_file):
    results = examined(recipe_file, "data.max_length=48", "data.overflow=cut", quick=True)
    assert "cut" in assert_first_to_fail(results, "data.shares")


def test_a_prompt_that_is_not_what_was_trained(recipe_file):
    class AddsSpace(Encoder):
        def encode_prompt(self, messages, tools=""):
            return [*super().encode_prompt(messages, tools), self.tokenizer.convert_tokens_to_ids("Ġ")]

    results = examined(recipe_file, quick=True, context=context_with_encoder(AddsSpace))
    assert "differs" in assert_first_to_fail(results, "serve.prompts")


def test_a_stop_token_that_was_never_trained(recipe_file):
    class StopsAtBos(Encoder):
        def __init__(self, tokenizer, template="auto"):
            super().__init__(tokenizer, template)
            self.stop_token_ids = (tokenizer.bos_token_id,)

    results = examined(recipe_file, "data.verify=false", quick=True, context=context_with_encoder(StopsAtBos))
    assert "'</s>'" in assert_first_to_fail(results, "serve.stops")


def test_a_saved_template_that_differs(recipe_file):
    class SavesLine(Encoder):
        def __init__(self, tokenizer, template="auto"):
            super().__init__(tokenizer, template)
            self.chat_template = self.chat_template.replace("' [/INST]'", "' [/INST]\\n'")

    results = examined(recipe_file, quick=True, context=context_with_encoder(SavesLine))
    assert "[/INST]" in assert_first_to_fail(results, "serve.template")


def test_a_template_that_writes_content_in_parts_otherwise(with_template):
    parts = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ '<text>' + part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    )
    assert "<text>" in assert_first_to_fail(with_template(parts + PROMPT), "serve.vllm")
