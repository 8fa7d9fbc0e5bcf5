"""A model whose template removes reasoning from the history, through the command line."""

import json

import pytest
from transformers import AutoTokenizer

from minisft.data.prepared import load_split
from tests.command import refused, run
from tests.tiny import write_tiny_model
from tests.unit.data.test_published_templates import FOLDER, STUBS
from tests.unit.data.test_reasoning_templates import CLOSED_BLOCK
from tests.unit.data.test_unrolled_data import talk
from tests.unit.data.toys import bpe_tokenizer


@pytest.fixture
def recipe(tmp_path):
    tokenizer = bpe_tokenizer(**STUBS["qwen3"])
    tokenizer.chat_template = (FOLDER / "qwen3.jinja").read_text()
    write_tiny_model(tmp_path / "model", tokenizer=tokenizer)
    rows = [talk(number, 1 + number % 3) for number in range(24)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tmp_path / 'model'}\noutput: {tmp_path / 'run'}\n"
        f"data: {{source: {tmp_path / 'talks.jsonl'}, test_fraction: 0.2}}\n"
        "training: {epochs: 1, batch_size: 8, precision: fp32}\nevaluation: {max_new_tokens: 8, turns: all}\n"
    )
    return path


def test_training_and_evaluation_of_unrolled_conversations(recipe, tmp_path, capsys):
    status, out, err = run(capsys, "train", recipe)
    assert status == 0, err
    folder = tmp_path / "run"
    ledger = json.loads((folder / "dataset" / "ledger.json").read_text())
    assert "conversations have one row per answer" in out
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = sum(step["supervised_tokens"] for step in steps if "supervised_tokens" in step)
    train = load_split(folder, "train")
    assert trained == sum(label >= 0 for labels in train["labels"] for label in labels)
    assert len([step for step in steps if "loss" in step]) == -(-len(train) // 8)  # a batch counts rows

    status, _, err = run(capsys, "evaluate", recipe)
    assert status == 0, err
    status, _, err = run(capsys, "report", recipe)
    assert status == 0, err
    assert "one row per answer" in (folder / "report.html").read_text()
    lines = (folder / "evaluation" / "base" / "outputs.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == ledger["unrolled"]["rows"]["test"]
    assert len({(answer["id"], answer["turn"]) for answer in answers}) == len(answers)
    assert all(answer["reference"].startswith("It is") for answer in answers)
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert results["constant"]["text"].startswith("It is")


def test_check_passes_on_unrolled_conversations(recipe, capsys):
    _, out, err = run(capsys, "check", recipe)
    written = json.loads((recipe.parent / "run" / "check.json").read_text())
    # The memory of this process is that of the tests before.
    assert {one["status"] for one in written["checks"] if not one["name"].startswith("spend.")} == {"ok"}, out + err


def test_check_passes_on_rows_that_are_a_prompt_and_an_answer(recipe, tmp_path, capsys):
    (tmp_path / "closed.jinja").write_text(CLOSED_BLOCK)
    rows = [talk(number, 2, reasoning_content=None) for number in range(24)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, out, err = run(capsys, "check", recipe, f"data.template={tmp_path / 'closed.jinja'}", "--quick")
    written = json.loads((tmp_path / "run" / "check.json").read_text())
    statuses = {one["name"]: one["status"] for one in written["checks"] if not one["name"].startswith("spend.")}
    assert "FAILED" not in statuses.values(), out + err
    ledger = json.loads((tmp_path / "run" / "dataset" / "ledger.json").read_text())
    assert ledger["findings"]["prompt_rewritten"] == 24


def test_options_reach_the_saved_model(recipe, tmp_path, capsys):
    rows = [talk(number, 2, reasoning_content=None) for number in range(12)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    status, _, err = run(capsys, "train", recipe, "data.template_options={enable_thinking: false}")
    assert status == 0, err
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    question = [{"role": "user", "content": "1 + 1?"}]
    prompt = saved.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert str(prompt).endswith("<think>\n\n</think>\n\n")
    status, _, err = run(capsys, "chat", tmp_path / "run", "--message", "1 + 1?", "--max-new-tokens", "4")
    assert status == 0, err


def test_options_that_the_template_does_not_read_are_refused(recipe, capsys):
    err = refused(capsys, "prepare", recipe, "data.template_options={enable_thinkin: false}")
    assert "does not read the variable 'enable_thinkin'" in err
    assert "enable_thinking" in err.partition("Fix:")[2]
    assert "reads no variables" in refused(
        capsys, "prepare", recipe, "data.template=chatml", "data.template_options={enable_thinking: false}"
    )
    assert "data.unroll" in refused(capsys, "prepare", recipe, "data.unroll=sometimes")
