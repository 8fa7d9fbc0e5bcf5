"""Early stopping by a generated metric: the score of every checkpoint is that of `evaluate`, and decides the end."""

import json
from dataclasses import replace

import pytest

import minisft as api
from minisft.errors import UserError
from minisft.recipe import load_recipe
from minisft.run_folder import RunFolder
from minisft.runner import train_run
from tests.tiny import WORDS, minisft, word_tokenizer, write_recipe, write_tiny_model

SETTINGS = "{epochs: 6, learning_rate: 1.0e-3, precision: fp32, save_every: 3, keep_optimizer: all}"
# The answers of a model that has hardly learned are all wrong: no checkpoint is better than the first.
STOPPING = [
    "training.early_stopping=2", "training.early_stopping_by=best_by", "evaluation.best_by=exact_match",
    "evaluation.metrics=[bleu, exact_match]",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model, conversations):
    return write_recipe(tmp_path_factory.mktemp("by-metric"), tiny_model, conversations, SETTINGS)


def train(recipe, output, *overrides, resume=False, pause_at=None):
    settings = replace(load_recipe(recipe, list(overrides)), output=str(output))
    return train_run(settings, force=False, resume=resume, pause_at=pause_at)


def names(run):
    return [path.name for path in run.list_checkpoints()]


def history(run, key="eval_exact_match"):
    state = json.loads((run.list_checkpoints()[-1] / "trainer_state.json").read_text())
    return {entry["step"]: entry[key] for entry in state["log_history"] if key in entry}


def test_the_run_ends_when_no_checkpoint_is_better_and_evaluate_agrees(recipe, tmp_path, capsys):
    run = train(recipe, tmp_path / "run", *STOPPING)
    assert names(run) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    assert "stopped early at step 9: 2 evaluations without a higher exact_match" in capsys.readouterr().out
    assert run.is_trained()
    results = api.evaluate(run.root)
    scores = {entry["step"]: entry["exact_match"]["score"] for entry in results["checkpoints"]}
    assert history(run) == scores
    plain = train(recipe, tmp_path / "plain", "training.max_steps=9", "training.scheduler=constant")
    same = train(recipe, tmp_path / "same", "training.max_steps=9", "training.scheduler=constant", *STOPPING)
    weights = [(one.model / "model.safetensors").read_bytes() for one in (plain, same)]
    assert weights[0] == weights[1], "scoring must not change a step"


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Every answer is the same eight words, which a model of whole words soon says, one after the other."""
    folder = tmp_path_factory.mktemp("easy")
    model = write_tiny_model(folder / "model", tokenizer=word_tokenizer())
    rows = [
        {"id": f"row-{number}", "prompt": WORDS[number % 20], "completion": " ".join(WORDS[:8])} for number in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_recipe(folder, model, folder / "rows.jsonl", SETTINGS)


def test_the_scores_during_training_are_those_of_evaluate(easy, tmp_path):
    words = ["evaluation.best_by=chrf", "evaluation.metrics=[chrf]", "training.learning_rate=1.0e-2"]
    run = train(easy, tmp_path / "run", *STOPPING, *words, "training.epochs=10")
    scores = list(history(run, "eval_chrf").values())
    assert len(set(scores)) > 1, "else the test shows nothing"
    assert scores == [entry["chrf"]["score"] for entry in api.evaluate(run.root)["checkpoints"]]
    best = scores.index(max(scores))
    assert len(scores) - 1 - best == 2, "it ends two checkpoints after the best"


def test_a_paused_and_a_killed_run_end_where_the_uninterrupted_one_does(recipe, tmp_path):
    whole = train(recipe, tmp_path / "whole", *STOPPING)
    paused = train(recipe, tmp_path / "paused", *STOPPING, pause_at=6)
    assert history(paused).keys() == {3}, "whoever asked for the end does not wait for answers"
    paused = train(recipe, tmp_path / "paused", *STOPPING, resume=True)
    assert (names(paused), history(paused)) == (names(whole), history(whole))
    # Killed between the last checkpoint and its score: that checkpoint is scored, and no step is taken.
    state = whole.list_checkpoints()[-1] / "trainer_state.json"
    unscored = json.loads(state.read_text())
    assert unscored["log_history"].pop()["eval_exact_match"] == 0.0
    state.write_text(json.dumps(unscored))
    weights = (whole.model / "model.safetensors").read_bytes()
    (whole.model / "model.safetensors").unlink()
    (whole.model / "config.json").unlink()
    whole = train(recipe, tmp_path / "whole", *STOPPING, resume=True)
    assert names(whole)[-1] == "checkpoint-9"
    assert (whole.model / "model.safetensors").read_bytes() == weights
    assert list(history(whole)) == [3, 6, 9]


def test_the_best_checkpoint_so_far_is_kept(recipe, tmp_path):
    run = train(recipe, tmp_path / "run", *STOPPING, "training.keep_checkpoints=1")
    assert names(run) == ["checkpoint-3", "checkpoint-9"]


def test_a_metric_that_fails_ends_the_run_with_a_complete_checkpoint(recipe, tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text("def broken(outputs, references, prompts):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["evaluation.metrics=[bleu, 'my_metrics:broken']", "evaluation.best_by=my_metrics:broken"]
    with pytest.raises(UserError, match="it returned 1 number") as error:
        train(recipe, tmp_path / "run", *STOPPING, *words)
    assert "checkpoint-3 is complete" in error.value.fix
    assert names(RunFolder(tmp_path / "run")) == ["checkpoint-3"]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["vanilla", "zero2", "zero3"])
def test_two_processes_agree(recipe, tmp_path, strategy):
    words = [*STOPPING, "evaluation.best_by=bleu", f"training.strategy={strategy}"]
    words += ["training.processes=2", "training.batch_size=4", f"output={tmp_path}/run"]
    done = minisft("train", recipe, *words, timeout=900)
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "run")
    scored = history(run, "eval_bleu")
    assert list(scored.values()) == [entry["bleu"]["score"] for entry in api.evaluate(run.root)["checkpoints"]]
    assert len(scored) == len(names(run))
