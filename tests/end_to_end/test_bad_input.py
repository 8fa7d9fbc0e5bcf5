"""What a user can fix: exit status 2, one message that says where, what and how, and no traceback."""

import json
import os
import sys

import pytest

from tests.command import refused, run
from tests.tiny import minisft


def data_file(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_as_a_process(recipe_file):
    done = minisft("train", recipe_file, "training.epoch=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'training.epochs'" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_verb_and_option(capsys):
    assert "did you mean `train`" in refused(capsys, "trian")
    assert "--bogus" in refused(capsys, "train", "x.yaml", "--bogus")
    assert "--forc" in refused(capsys, "train", "x.yaml", "--forc")
    assert "required" in refused(capsys, "train")


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_missing_data_file(capsys, recipe_file, verb):
    said = refused(capsys, verb, recipe_file, "data.source=nowhere.jsonl")
    assert "nowhere.jsonl" in said


@pytest.mark.parametrize("verb", ["prepare", "train"])
@pytest.mark.parametrize("key", ["data.source", "data.test"])
def test_force_deletes_nothing_for_a_file_that_is_not_there(capsys, recipe_file, tmp_path, verb, key):
    assert run(capsys, "prepare", recipe_file)[0] == 0
    before = sorted((tmp_path / "run").rglob("*"))
    assert "nowhere.jsonl" in refused(capsys, verb, recipe_file, f"{key}=nowhere.jsonl", "--force")
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert (tmp_path / "run" / "dataset" / "ledger.json").exists()


def test_an_unreadable_data_file(capsys, recipe_file, tmp_path):
    path = data_file(tmp_path, b"\xff\xfe\x00\x01broken")
    assert path.name in refused(capsys, "prepare", recipe_file, f"data.source={path}")


def test_a_line_that_is_not_json(capsys, recipe_file, tmp_path):
    row = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    path = data_file(tmp_path, f"{row}\n{row}\n{{broken\n")
    said = refused(capsys, "prepare", recipe_file, f"data.source={path}")
    assert f"{path.name}:3" in said
    assert "JSON" in said


@pytest.mark.parametrize("text", ["", "[]", "\n\n"])
def test_no_conversations(capsys, recipe_file, tmp_path, text):
    path = data_file(tmp_path, text, "data.json")
    assert path.name in refused(capsys, "prepare", recipe_file, f"data.source={path}")


def test_a_row_without_answers(capsys, recipe_file, tmp_path):
    path = data_file(tmp_path, json.dumps({"conversations": [{"from": "human", "value": "a"}]}) + "\n")
    said = refused(capsys, "prepare", recipe_file, f"data.source={path}")
    assert f"{path.name}:1" in said


def test_an_unknown_format(capsys, recipe_file, tmp_path):
    path = data_file(tmp_path, json.dumps({"tweet": "hello", "label": 1}) + "\n")
    said = refused(capsys, "prepare", recipe_file, f"data.source={path}")
    assert "sharegpt" in said
    assert "data.format" in refused(capsys, "prepare", recipe_file, "data.format=sharegtp")


def test_an_unknown_model(capsys, recipe_file):
    assert "no/such" in refused(capsys, "train", recipe_file, "model=no/such")


def test_a_model_without_a_chat_template(capsys, recipe_file):
    said = refused(capsys, "prepare", recipe_file, "data.template=auto")
    assert "chat template" in said
    assert "data.template" in said


def test_an_output_that_holds_another_run(capsys, recipe_file, tmp_path):
    folder = tmp_path / "run"
    assert run(capsys, "prepare", recipe_file)[0] == 0
    (folder / "metrics.jsonl").write_text("{}\n")
    said = refused(capsys, "train", recipe_file, "training.learning_rate=0.5")
    assert "another recipe's run" in said
    assert "learning_rate" in said
    assert "--resume" in refused(capsys, "train", recipe_file)
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


def test_an_output_that_is_something_else(capsys, recipe_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "thesis.tex" in refused(capsys, "train", recipe_file, f"output={tmp_path / 'mine'}", "--force")


def test_more_processes_than_there_are(capsys, recipe_file):
    cores = len(os.sched_getaffinity(0))
    said = refused(capsys, "train", recipe_file, f"training.processes={cores + 1}")
    assert f"{cores} " in said


def test_fp16_on_a_cpu(capsys, recipe_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "fp16 is for GPUs" in refused(capsys, "train", recipe_file, "training.precision=fp16")


def test_zero_where_deepspeed_is_missing(capsys, recipe_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "DeepSpeed is not installed" in refused(capsys, "train", recipe_file, "training.strategy=zero2")


def test_zero_where_there_is_no_compiler(capsys, recipe_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in refused(capsys, "train", recipe_file, "training.strategy=zero2")


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_an_unknown_optimizer_or_scheduler(capsys, recipe_file, key):
    assert f"there is no {key} 'x'" in refused(capsys, "train", recipe_file, f"training.{key}=x")


def test_evaluate_and_chat_want_a_run(capsys, tmp_path):
    assert "not a run folder" in refused(capsys, "evaluate", tmp_path)
    refused(capsys, "chat", tmp_path / "nothing")
