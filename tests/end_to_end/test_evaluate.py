"""Evaluation through the command line: sacrebleu's own numbers, and nothing twice when it is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from minisft.run_folder import RunFolder
from tests.tiny import minisft, write_conversations, write_recipe


def train(folder, model, conversations, *overrides):
    settings = "{epochs: 32, save_every: 48, learning_rate: 1.0e-2, precision: fp32}"  # enough to score above 0
    recipe = write_recipe(folder, model, conversations, settings)
    done = minisft("train", recipe, "data.test_fraction=0.3", *overrides)
    assert done.returncode == 0, done.stderr
    return RunFolder(folder / "run")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Dialogues that differ in what is said and agree in the answer: soon learned."""
    path = write_conversations(tmp_path_factory.mktemp("data") / "talks.jsonl", 33)
    talks = [json.loads(line) for line in path.read_text().splitlines()]
    for turn in (turn for talk in talks for turn in talk["conversations"] if turn["from"] == "gpt"):
        turn["value"] = "one tea with milk please"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return path


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory, tiny_model, conversations):
    return train(tmp_path_factory.mktemp("evaluate"), tiny_model, conversations)


def results_of(run):
    return json.loads((run.root / "evaluation/results.json").read_text())


def evaluate(run, *overrides):
    done = minisft("evaluate", run.root, *overrides)
    assert done.returncode == 0, done.stderr
    return results_of(run)


def sacrebleu_of(folder):
    """What sacrebleu's command line prints for an `outputs.jsonl`, one answer a line."""
    rows = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    for name in ("output", "reference"):
        (folder / name).write_text("".join(" ".join(row[name].splitlines()) + "\n" for row in rows), encoding="utf-8")
    words = ["reference", "-i", "output", "-m", "bleu", "chrf", "--confidence", "-w", "8"]
    command = [sys.executable, "-m", "sacrebleu", *words]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return {score["name"].lower()[:4]: score for score in json.loads(printed)}


def check_against_sacrebleu(run):
    results = evaluate(run, "evaluation.max_new_tokens=24", "evaluation.turns=all")
    assert len(results["checkpoints"]) == 2
    assert all(entry["chrf"]["half_width"] > 0 for entry in results["checkpoints"])
    assert results["checkpoints"][-1]["bleu"]["mean"] > 0
    for entry in (results["base"], *results["checkpoints"]):
        theirs = sacrebleu_of(run.root / "evaluation" / entry.get("checkpoint", "base"))
        for metric in ("bleu", "chrf"):
            ours = entry[metric]
            assert ours["score"] == pytest.approx(theirs[metric]["score"], abs=1e-6)
            # Where every resample scores 0 sacrebleu prints no interval.
            assert ours["mean"] == pytest.approx(theirs[metric].get("confidence_mean", 0.0), abs=1e-5)
            assert ours["half_width"] == pytest.approx(theirs[metric].get("confidence_var", 0.0), abs=1e-5)
            assert ours["signature"] == theirs[metric]["signature"]


def test_scores_and_intervals_are_sacrebleus_for_every_checkpoint(vanilla):
    check_against_sacrebleu(vanilla)


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        ("training.strategy=zero3", "training.processes=2", "training.batch_size=4"),
        ("training.lora={rank: 4}",),
    ],
    ids=["zero3", "lora"],
)
def test_scores_are_those_of_sacrebleu_under_zero3_and_with_lora(tmp_path, tiny_model, conversations, overrides):
    check_against_sacrebleu(train(tmp_path, tiny_model, conversations, *overrides))


SLOW = ("evaluation.max_new_tokens=150", "evaluation.batch_size=1", "evaluation.turns=all")


@pytest.fixture(scope="module")
def undisturbed(vanilla, tmp_path_factory):
    copy = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(vanilla.root, copy, ignore=shutil.ignore_patterns("evaluation"))
    return without_times(evaluate(RunFolder(copy), *SLOW))


def without_times(results):
    for entry in (results["base"], *results["checkpoints"]):
        entry.pop("seconds")
    return results


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_evaluation_resumes_and_generates_nothing_twice(vanilla, undisturbed, tmp_path, processes):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(vanilla.root, run.root, ignore=shutil.ignore_patterns("evaluation"))
    words = [*SLOW, f"evaluation.processes={processes}"]
    first = run.root / "evaluation/checkpoint-48/journal.jsonl"
    kill_once(lambda: first.exists() and first.read_text().count('"answers"') >= 3, "evaluate", run.root, *words)
    kept = {path: whole_lines(path) for path in run.root.glob("evaluation/*/journal.jsonl")}
    assert not (run.root / "evaluation/checkpoint-96").exists()
    assert without_times(evaluate(run, *words)) == undisturbed
    for path in run.root.glob("evaluation/*/journal.jsonl"):
        lines = whole_lines(path)
        assert lines[: len(kept.get(path, []))] == kept.get(path, []), "what was there is of use"
        keys = [key for line in lines for key, _ in line.get("answers", [])]
        assert len(keys) == len(set(keys)) > 6
        assert sum("loss" in line for line in lines) == 1


def kill_once(ready, *words):
    """Start the command line, and kill it as soon as `ready` says so."""
    command = [sys.executable, "-m", "minisft", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    end = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def whole_lines(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_report_writes_the_page_and_the_results_with_preview_and_environment(vanilla):
    evaluate(vanilla, "evaluation.prompts=[One tea please]")
    done = minisft("report", vanilla.root)
    assert done.returncode == 0, done.stderr
    page = (vanilla.root / "report.html").read_text()
    for part in ("preview", "environment", "scores", "ledger", "speed"):
        assert f'id="{part}"' in page
    assert "your prompt-1" in page
    text = (vanilla.root / "results.md").read_text()
    assert "| base | 0 |" in text
    assert (vanilla.root / "evaluation/scores.png").exists()


def test_the_preview_shows_what_is_learned_of_the_first_train_row(vanilla, conversations):
    row = json.loads((vanilla.dataset / "preview.json").read_text())["rows"][0]
    [name] = re.findall(r"id (talk-\d+)", row["title"])
    talks = [json.loads(line) for line in conversations.read_text().splitlines()]
    [turns] = [talk["conversations"] for talk in talks if talk["id"] == name]
    learned = "".join(text for text, supervised in row["tokens"] if supervised)
    assert learned == "".join(f"{turn['value']}</s>" for turn in turns if turn["from"] == "gpt")


@pytest.mark.long
def test_bad_settings_of_evaluation_exit_with_2(vanilla):
    for override, said in (
        ("evaluation.backend=vllm", "vllm is "),
        ("evaluation.prompts=nowhere.txt", "nowhere.txt cannot be read"),
        ("evaluation.max_new_tokens=512", "no room for a prompt"),
    ):
        done = minisft("evaluate", vanilla.root, override)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
