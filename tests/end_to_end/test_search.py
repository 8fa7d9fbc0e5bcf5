"""`search` through the command line: the winner's bits, the test rows, kills, failures and refusals."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sacrebleu.metrics import CHRF

pytest.importorskip("optuna")

from minisft.data.prepared import load_split
from minisft.run_folder import RunFolder, read_metrics
from tests.command import refused, run
from tests.tiny import minisft, write_conversations, write_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="trials are started as on Linux")
SETTINGS = "{epochs: 1, learning_rate: 1.0e-3, precision: fp32, batch_size: 4}"
RATES = "training.learning_rate=3e-3,1e-3,1e9,1e-2"
WATCHER = """
import os, sys, time
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and "/test/dataset/test/" in arguments[0]:
        if arguments[1] in ("r", "rb") or (arguments[1] is None and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            with os.fdopen(os.open(os.environ["READS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
                file.write(f"{time.time()} {arguments[0]}\\n")
sys.addaudithook(watch)
"""


def read(path):
    return json.loads(Path(path).read_text())


def bits(folder):
    weights = (Path(folder) / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()


def outcome(output):
    """What must not depend on kills and workers."""
    found = read(output / "search.json")
    trials = [{key: value for key, value in trial.items() if key != "seconds"} for trial in found["trials"]]
    return trials, found["best"]["number"], found["indistinguishable"], bits(output / found["best"]["run"])


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("talks") / "talks.jsonl", 80)


@pytest.fixture(scope="module")
def searched(tmp_path_factory, tiny_model, talks):
    """Return the folder of a search of four learning rates, its command, the command's result, and reads of the test rows."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(WATCHER)
    recipe = write_recipe(folder, tiny_model, talks, SETTINGS)
    words = ["search", recipe, "--vary", RATES, "--validation", "0.3"]
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    done = minisft(*words, PYTHONPATH=path, READS=str(folder / "reads"), PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    return folder / "run", words, done, folder / "reads"


def test_search_json_has_the_promised_shape(searched):
    output, _, done, _ = searched
    found = read(output / "search.json")
    assert found["objective"] == "loss"
    assert found["rungs"] == [0.125, 0.25, 0.5, 1.0]
    assert [trial["number"] for trial in found["trials"]] == [0, 1, 2, 3]
    for trial in found["trials"]:
        assert {"number", "settings", "state", "steps", "objective", "low", "high", "run"} <= set(trial)
    states = {trial["settings"]["training.learning_rate"]: trial["state"] for trial in found["trials"]}
    assert states.pop(1e9) in ("failed", "pruned")
    assert sorted(states.values()).count("complete") == 1
    assert set(found["test"]) == {"base", "defaults", "best"}
    assert found["test"]["best"]["loss"] < found["test"]["base"]["loss"]
    best = found["trials"][found["best"]["number"]]
    assert best["state"] == "complete"
    assert best["low"] <= best["objective"] <= best["high"]
    assert found["best"]["settings"] == best["settings"]
    assert f"best: trial {best['number']}" in done.stdout
    assert "rung 0.125" in done.stdout


def test_the_winner_is_bit_for_bit_the_run_of_its_recipe(searched):
    output, _, _, _ = searched
    best = read(output / "search.json")["best"]
    done = minisft("train", output / best["recipe"])
    assert done.returncode == 0, done.stderr
    assert bits(output / "best") == bits(output / best["run"])
    plain, winner = (RunFolder(output / name) for name in ("best", best["run"]))
    assert [path.name for path in winner.list_checkpoints()] == [path.name for path in plain.list_checkpoints()]
    assert [line["loss"] for line in read_metrics(winner)] == [line["loss"] for line in read_metrics(plain)]


def test_the_processes_of_trials_import_large_libraries_once(searched):
    output, _, _, _ = searched
    logs = [path.read_text() for path in (output / "trials").glob("*.log")]
    imported = [line.rpartition("|")[2].strip() for log in logs for line in log.splitlines() if "import time:" in line]
    assert imported, "Python lists the imports"
    libraries = {name.partition(".")[0] for name in imported} - {"minisft"}
    assert not libraries & {"deepspeed", "accelerate", "datasets", "tensorboard", "pandas"}


def test_the_test_rows_are_read_by_nothing_before_the_last_trial_has_ended(searched):
    output, _, _, reads = searched
    opened = [float(line.split()[0]) for line in reads.read_text().splitlines()]
    assert opened, "the watcher sees the reads at the end"
    rungs = [path.stat().st_mtime for path in (output / "losses").glob("trial-*.npz")]
    assert min(opened) > max(rungs)
    test_ids = set(_ids(output / "test", "test"))
    assert not test_ids & {row for split in ("train", "test") for row in _ids(output / "trials" / "0", split)}


def _ids(run, split):
    return [row["id"] for row in load_split(run, split)]


def test_a_stopped_trial_has_no_optimizer_state(searched):
    output, _, _, _ = searched
    found = read(output / "search.json")
    own = {"training.learning_rate": 1e-3}  # it was trained to the end for the comparison
    for trial in found["trials"]:
        if trial["state"] == "pruned" and trial["settings"] != own:
            assert not list((output / trial["run"]).glob("checkpoints/*/optimizer.pt"))


@pytest.mark.long
def test_a_second_call_needs_resume_which_repeats_nothing(searched):
    output, words, _, _ = searched
    refused = minisft(*words)
    assert refused.returncode == 2
    assert "holds a search already" in refused.stderr
    assert "--resume" in refused.stderr
    before, logs = outcome(output), {path: path.read_text() for path in output.glob("trials/*.log")}
    again = minisft(*words, "--resume", "--json")
    assert again.returncode == 0, again.stderr
    assert outcome(output) == before
    assert json.loads(again.stdout) == read(output / "search.json")
    assert {path: path.read_text() for path in output.glob("trials/*.log")} == logs


@pytest.mark.long
def test_resume_refuses_another_recipe_and_other_data(searched, tmp_path, talks):
    _, words, _, _ = searched
    other = minisft(*words, "--resume", "training.weight_decay=0.1")
    assert other.returncode == 2
    assert "training.weight_decay is 1e-05 there, 0.1 here" in other.stderr
    changed = talks.read_text()
    try:
        talks.write_text("".join(changed.splitlines(keepends=True)[:-1]))
        moved = minisft(*words, "--resume")
    finally:
        talks.write_text(changed)
    assert moved.returncode == 2
    assert "changed since then" in moved.stderr
    assert "choose another `output`" in moved.stderr


@pytest.mark.long
def test_when_all_trials_fail_the_first_error_is_said(tmp_path, tiny_model, talks):
    recipe = write_recipe(tmp_path, tiny_model, talks, SETTINGS)
    done = minisft("search", recipe, "--vary", "training.learning_rate=1e30,1e31", "--no-defaults")
    assert done.returncode == 2
    assert "trial 0 failed, and the others go on: " in done.stderr
    assert "all 2 trials failed, and none reached its end; the first: " in done.stderr
    assert "Traceback" not in done.stderr
    states = [trial["state"] for trial in read(tmp_path / "run" / "search.json")["trials"]]
    assert states == ["failed", "failed"]


@pytest.mark.long
def test_without_validation_rows_nothing_is_trained(tmp_path, tiny_model):
    one = json.dumps({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]})
    (tmp_path / "one.jsonl").write_text(f"{one}\n" * 8)
    recipe = write_recipe(tmp_path, tiny_model, tmp_path / "one.jsonl", SETTINGS)
    done = minisft("search", recipe, "--vary", "training.learning_rate=1e-3,1e-2")
    assert done.returncode == 2
    assert "no conversation is left to validate on" in done.stderr


def test_a_foreign_folder_is_refused(tmp_path, tiny_model, talks):
    recipe = write_recipe(tmp_path, tiny_model, talks, SETTINGS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    done = minisft("search", recipe, "--vary", RATES)
    assert done.returncode == 2
    assert "neither a new folder nor that of a search" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.long
def test_two_workers_give_the_trials_of_one(searched, tmp_path, tiny_model, talks):
    output, words, _, _ = searched
    recipe = write_recipe(tmp_path, tiny_model, talks, SETTINGS)
    done = minisft(*words[:1], recipe, *words[2:], "--workers", 2, "--storage", f"journal:{tmp_path / 'study.log'}")
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run") == outcome(output)
    for log in (tmp_path / "run" / "trials").glob("*.log"):
        assert "another process is at work" not in log.read_text()


@pytest.mark.long
def test_killed_at_ten_random_moments_the_search_ends_with_the_same_bits(searched, tmp_path, tiny_model, talks):
    output, words, _, _ = searched
    recipe = write_recipe(tmp_path, tiny_model, talks, SETTINGS)
    command = [sys.executable, "-m", "minisft", *map(str, [words[0], recipe, *words[2:]])]
    choose = random.Random(0)
    kills = 0
    while kills < 10:
        resume = ["--resume"] if (tmp_path / "run" / "search.json").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            process.wait(choose.uniform(2, 40))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    done = minisft(*command[3:], "--resume", timeout=900)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run") == outcome(output)
    shutil.rmtree(tmp_path / "run")


@pytest.mark.long
def test_asked_to_stop_it_saves_and_goes_on(searched, tmp_path, tiny_model, talks):
    output, words, _, _ = searched
    recipe = write_recipe(tmp_path, tiny_model, talks, SETTINGS)
    command = [sys.executable, "-m", "minisft", *map(str, [words[0], recipe, *words[2:]])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run").glob("losses/trial-1*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "--resume continues from there" in err
    done = minisft(*command[3:], "--resume")
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run") == outcome(output)


@pytest.mark.long
def test_a_metric_chooses_among_trials_whose_seed_and_length_differ(tmp_path, tiny_model, talks):
    recipe = write_recipe(tmp_path, tiny_model, talks, SETTINGS)
    varied = ["--vary", "seed=0,1", "--vary", "data.max_length=256,300", "--objective", "chrf"]
    done = minisft("search", recipe, *varied, "--validation", "0.3", "--no-defaults", "--json")
    assert done.returncode == 0, done.stderr
    output, found = tmp_path / "run", json.loads(done.stdout)
    assert (found["objective"], found["higher_is_better"]) == ("chrf", True)
    assert [(one["settings"]["seed"], one["settings"]["data.max_length"]) for one in found["trials"]] == [
        (0, 256), (0, 300), (1, 256), (1, 300),
    ]  # fmt: skip
    assert len({tuple(_ids(output / trial["run"], "test")) for trial in found["trials"]}) == 1
    assert len({line["loss"] for run in "02" for line in read_metrics(RunFolder(output / "trials" / run))[:1]}) == 2
    best = found["trials"][found["best"]["number"]]
    outputs = output / "validation" / f"trial-{best['number']}-{best['steps']}" / "outputs.jsonl"
    answers = [json.loads(line) for line in outputs.read_text().splitlines()]
    texts = [[" ".join(answer[key].splitlines()) for answer in answers] for key in ("output", "reference")]
    assert best["objective"] == pytest.approx(CHRF().corpus_score(texts[0], [texts[1]]).score)
    assert best["objective"] == max(one["objective"] for one in found["trials"] if one["state"] == "complete")
    assert {"bleu", "chrf", "loss"} <= set(found["test"]["best"])
    done = minisft("train", output / found["best"]["recipe"])
    assert done.returncode == 0, done.stderr
    assert bits(output / "best") == bits(output / found["best"]["run"])
    other = minisft("search", recipe, *varied[:-2], "--validation", "0.3", "--no-defaults", "--resume")
    assert "--objective is 'chrf' there, 'loss' here" in other.stderr


def test_a_value_that_changes_the_validation_rows_is_refused_before_any_trial(capsys, recipe_file, tmp_path):
    error = refused(capsys, "search", recipe_file, "--vary", "data.max_length=48,256")
    assert "--vary data.max_length=48" in error
    assert "trials are compared on the same ones" in error or "changes the validation rows" in error
    assert not list((tmp_path / "run").glob("trials/*"))


def test_an_objective_that_does_not_exist_is_refused(capsys, recipe_file, tmp_path):
    assert "there is no metric 'blue'" in refused(capsys, "search", recipe_file, "--objective", "blue")
    assert not (tmp_path / "run").exists()


def test_a_range_test_prints_the_rates_and_leaves_no_run(capsys, recipe_file, tmp_path):
    done = run(capsys, "search", recipe_file, "--lr-range", "--json")
    found = json.loads(done.out)
    assert done.status == 0, done.err
    assert found["rates"] == sorted(found["rates"])
    assert len(found["rates"]) == len(found["losses"])
    assert not (tmp_path / "run").exists()


def test_a_range_test_has_no_options_of_a_search(capsys, recipe_file):
    assert "leave out --budget" in refused(capsys, "search", recipe_file, "--lr-range", "--budget", "20")
