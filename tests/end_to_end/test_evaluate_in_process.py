"""Evaluation of runs that are not as they should be: damaged checkpoints, no held-out rows, odd temperatures."""

import contextlib
import io
import json
import shutil

import pytest

from minisft.cli import main
from minisft.processes import CompletedVerb
from tests.command import run
from tests.tiny import write_recipe


def results_of(run):
    return json.loads((run / "evaluation/results.json").read_text())


def damage(run, step):
    path = run / f"checkpoints/checkpoint-{step}/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


# --- damaged checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_damaged_checkpoint_ends_with_2_and_all_else_is_scored(run_folder, capsys, options):
    damage(run_folder, 2)
    status, printed, said = run(capsys, "evaluate", run_folder, *options)
    assert status == 2
    assert "checkpoints: checkpoint-2: 1 checkpoint is damaged and not scored" in said
    assert "restore it from a copy or delete it, then evaluate again" in said
    assert "checkpoint-4" in printed
    results = results_of(run_folder)
    assert [failure["checkpoint"] for failure in results["failed"]] == ["checkpoint-2"]
    assert [entry["checkpoint"] for entry in results["checkpoints"]] == ["checkpoint-4"]
    shutil.rmtree(run_folder / "checkpoints/checkpoint-2")
    assert run(capsys, "evaluate", run_folder)[0] == 0


def test_several_damaged_checkpoints_are_all_named_and_deleting_them_fixes_it(run_folder, capsys):
    shutil.rmtree(run_folder / "evaluation")
    for step in (2, 4):
        damage(run_folder, step)
    status, _, said = run(capsys, "evaluate", run_folder)
    assert status == 2
    assert "checkpoint-2, checkpoint-4: 2 checkpoints are damaged" in said
    shutil.rmtree(run_folder / "checkpoints/checkpoint-2")
    shutil.copytree(run_folder / "model", run_folder / "checkpoints/checkpoint-4", dirs_exist_ok=True)
    status, _, said = run(capsys, "evaluate", run_folder)
    assert status == 0
    assert results_of(run_folder)["failed"] == [], "what was never scored and is gone is no failure"


def test_a_checkpoint_that_was_removed_is_no_damage(run_folder, capsys):
    shutil.rmtree(run_folder / "checkpoints/checkpoint-2")
    status, printed, _ = run(capsys, "evaluate", run_folder, "evaluation.max_new_tokens=4")
    assert status == 0
    assert "removed" in printed
    assert "damaged" not in printed


def test_a_comparison_calls_a_variant_with_a_damaged_checkpoint_failed(
    tmp_path, tiny_model, conversations, capsys, monkeypatch
):
    def run_verb(words, log, follow):  # without a process of its own, which takes seconds
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return CompletedVerb(main(words), said.getvalue())

    monkeypatch.setattr("minisft.comparison.compare.run_verb", run_verb)
    recipe = write_recipe(tmp_path, tiny_model, conversations, "{max_steps: 1, precision: fp32}")
    words = ("compare", recipe, "--vary", "seed=0")
    assert run(capsys, *words, "--no-evaluate")[0] == 0
    damage(tmp_path / "run/compare/seed-0", 1)
    status, _, said = run(capsys, *words)
    assert status == 2
    assert "seed-0: evaluate failed" in said
    assert "1 checkpoint is damaged" in said


# --- no held-out rows ---------------------------------------------------------------------------------------


@pytest.fixture
def run_without_held_out_rows(tmp_path, tiny_model, conversations, capsys):
    recipe = write_recipe(tmp_path, tiny_model, conversations, "{max_steps: 1, precision: fp32}")
    assert run(capsys, "train", recipe, "data.test_fraction=0")[0] == 0
    return tmp_path / "run"


def test_custom_prompts_need_no_test_set(run_without_held_out_rows, tmp_path, capsys):
    prompts = "evaluation.prompts=[One tea please, Two cups]"
    status, printed, said = run(capsys, "evaluate", run_without_held_out_rows, prompts)
    assert status == 0, said
    assert "There are no held-out conversations, so nothing is scored" in printed
    assert "not a finite number" not in said
    assert "every answer is empty" not in said
    for name in ("base", "checkpoint-1"):
        lines = (run_without_held_out_rows / "evaluation" / name / "prompts.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["prompt-1", "prompt-2"]
    assert (run_without_held_out_rows / "evaluation/prompts.txt").read_text().count("--- checkpoint-1 ---") == 2
    results = results_of(run_without_held_out_rows)
    assert (results["best"], results["answers"], results["prompts"]) == (None, 0, 2)
    assert "bleu" not in results["base"]
    assert run(capsys, "evaluate", run_without_held_out_rows, prompts)[0] == 0, "and again, with the cached answers"
    status, _, said = run(capsys, "report", run_without_held_out_rows)
    assert status == 0, said
    text = (run_without_held_out_rows / "results.md").read_text()
    assert "nothing is scored" in text
    assert "One tea please" in text
    assert "One tea please" in (run_without_held_out_rows / "report.html").read_text()
    status, _, said = run(capsys, "export", run_without_held_out_rows, tmp_path / "exported", "--checkpoint", "best")
    assert status == 2
    assert "no checkpoint is scored" in said


def test_without_prompts_too_there_is_nothing_to_evaluate(run_without_held_out_rows, capsys):
    status, _, said = run(capsys, "evaluate", run_without_held_out_rows)
    assert status == 2
    assert "there are no held-out conversations to evaluate on" in said
    assert "evaluation.prompts" in said


# --- temperatures -------------------------------------------------------------------------------------------


def outputs_of(run):
    path = run / "evaluation/base/outputs.jsonl"
    return [json.loads(line)["output"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("temperature", ["1e-300", "5e-324"])
def test_a_temperature_near_zero_takes_the_likeliest_token(run_folder, capsys, temperature):
    greedy = outputs_of(run_folder)
    status, _, said = run(capsys, "evaluate", run_folder, f"evaluation.temperature={temperature}")
    assert status == 0, said
    assert outputs_of(run_folder) == greedy
    message = ("--message", "hi", "--max-new-tokens", "4")
    plain = run(capsys, "chat", run_folder, *message)
    assert plain[0] == 0
    assert run(capsys, "chat", run_folder, *message, "--temperature", temperature)[:2] == plain[:2]
