"""`minisft verify`: an unchanged run holds under each strategy, and each change is found and named."""

import json
import os
import shutil

import datasets
import pytest
from safetensors.torch import load_file, save_file

import minisft
from minisft.run_folder import RunFolder
from minisft.training.certificate import write_certificate
from tests.command import refused, run
from tests.tiny import write_recipe

_SETTINGS = "epochs: 2, learning_rate: 1.0e-3, precision: fp32, keep_optimizer: all"


def trained(folder, model, conversations, settings):
    from minisft.cli import main

    recipe = write_recipe(folder, model, conversations, f"{{{_SETTINGS}{settings}}}")
    assert main(["train", str(recipe)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, conversations):
    """Return a run of 8 steps with the checkpoints 4 and 8, both with optimizer state."""
    return trained(tmp_path_factory.mktemp("verified"), tiny_model, conversations, "")


@pytest.fixture
def copy(whole, tmp_path):
    """Return a copy of the run, for a test to change."""
    return RunFolder(shutil.copytree(whole, tmp_path / "run"))


def verify(capsys, folder, *words):
    status, out, err = run(capsys, "verify", folder, "--json", *words)
    return status, json.loads(out), err


def test_an_unchanged_run_is_replayed_to_the_same_bits_and_not_written_to(capsys, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    status, found, err = verify(capsys, whole, "--steps", 8)
    assert (status, found) == (0, {"ok": True, "changed": [], "replayed": 8, "notes": []}), err
    assert "replaying steps 1 to 4 from the beginning: about" in err
    assert "replaying steps 5 to 8 from checkpoint-4: about" in err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_hashes_alone_are_compared_without_steps(whole):
    found = minisft.verify(whole, steps=0)
    assert (found.ok, found.changed, found.replayed, found.notes) == (True, (), 0, ())


def test_a_lora_run_is_replayed_to_the_same_bits(capsys, tmp_path, tiny_model, conversations):
    folder = trained(tmp_path, tiny_model, conversations, ", lora: {rank: 4, alpha: 8}")
    status, found, err = verify(capsys, folder, "--steps", 4)
    assert (status, found["replayed"], found["notes"]) == (0, 4, []), err
    check_that_changes_are_found(capsys, folder, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["vanilla", "zero2"])
def test_a_run_of_two_processes_is_replayed_to_the_same_bits(capsys, tmp_path, tiny_model, conversations, strategy):
    settings = f", strategy: {strategy}, processes: 2, batch_size: 4"
    folder = trained(tmp_path, tiny_model, conversations, settings)
    status, found, err = verify(capsys, folder, "--steps", 4)
    assert (status, found["replayed"], found["notes"]) == (0, 4, []), err
    check_that_changes_are_found(capsys, folder, tmp_path)


# --- changes ----------------------------------------------------------------------------------------------


def change_split(folder, split, column, row):
    """Change one number of a row, and write the split as it was."""
    data = datasets.load_from_disk(str(folder.dataset / split))
    rows = data.to_list()
    place = next(at for at, label in enumerate(rows[row]["labels"]) if label >= 0)
    rows[row][column][place] = -100 if column == "labels" else rows[row][column][place] ^ 1
    shutil.rmtree(folder.dataset / split)
    datasets.Dataset.from_list(rows, features=data.features).save_to_disk(str(folder.dataset / split))


def change_weight(path):
    weights = load_file(path)
    next(iter(weights.values())).flatten()[0] += 1.0
    save_file(weights, path, metadata={"format": "pt"})


def change_log(folder):
    lines = folder.metrics.read_text().splitlines()
    line = json.loads(lines[4])
    line["loss"] *= 1.001
    lines[4] = json.dumps(line)
    folder.metrics.write_text("\n".join(lines) + "\n")


def change_text(path):
    path.write_text(path.read_text() + " ")


CHANGES = {
    "row": (lambda run: change_split(run, "train", "input_ids", 17), "row", "dataset/train: row 17 (id talk-"),
    "mask": (lambda run: change_split(run, "train", "labels", 3), "mask", "dataset/train: row 3 (id talk-"),
    "test row": (lambda run: change_split(run, "test", "input_ids", 1), "row", "dataset/test: row 1 (id talk-"),
    "weight": (
        lambda run: change_weight(next(run.model.glob("*.safetensors"))),
        "weights",
        "model/model.safetensors: changed",
    ),
    "log line": (change_log, "log line", "metrics.jsonl: line 5 (step 5)"),
    "template": (
        lambda run: change_text(run.model / "chat_template.jinja"),
        "template",
        "model/chat_template.jinja: changed",
    ),
    "checkpoint": (
        lambda run: (run.checkpoints / "checkpoint-4" / "optimizer.pt").write_bytes(b"other"),
        "checkpoint",
        "checkpoints/checkpoint-4/optimizer.pt: changed",
    ),
    "checkpoint's weights": (
        lambda run: change_weight(run.checkpoints / "checkpoint-4" / "model.safetensors"),
        "weights",
        "checkpoints/checkpoint-4/model.safetensors: changed",
    ),
    "no checkpoint": (
        lambda run: shutil.rmtree(run.checkpoints / "checkpoint-4"),
        "checkpoint",
        "checkpoints/checkpoint-4: missing",
    ),
    "added file": (lambda run: (run.model / "more.py").write_text("x"), "checkpoint", "model/more.py: added"),
    "row losses": (
        lambda run: run.row_losses.write_bytes(run.row_losses.read_bytes()[:-1] + b"\x41"),
        "row losses",
        "row_losses.bin: step 8",
    ),
    "no row losses": (lambda run: run.row_losses.unlink(), "row losses", "row_losses.bin: step 1"),
    "ledger": (lambda run: change_text(run.dataset / "ledger.json"), "data", "dataset/ledger.json"),
    "recipe": (
        lambda run: run.recipe.write_text(run.recipe.read_text().replace("learning_rate: 0.001", "learning_rate: 0.1")),
        "recipe",
        "recipe.yaml: a key",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_named(capsys, copy, name):
    change, what, where = CHANGES[name]
    change(copy)
    status, found, err = verify(capsys, copy.root)
    assert (status, found["ok"], found["replayed"]) == (2, False, 0)
    assert any(one["what"] == what and one["where"].startswith(where) for one in found["changed"]), found
    assert {one["what"] for one in found["changed"]} == {what}
    assert "the run has changed since it ended" in err


def check_that_changes_are_found(capsys, folder, tmp_path):
    """Make six changes, each in a copy of a run of any kind, and see that each is found and no other is reported."""
    for name in ("row", "mask", "weight", "log line", "template", "row losses"):
        changed = RunFolder(shutil.copytree(folder, tmp_path / f"changed {name}"))
        change, what, _ = CHANGES[name]
        change(changed)
        status, found, _ = verify(capsys, changed.root)
        assert (status, {one["what"] for one in found["changed"]}) == (2, {what}), name


def test_what_is_printed_says_whether_steps_were_replayed(capsys, whole):
    for steps, said in ((1, "1 replayed step gave what was logged"), (0, "no step was replayed, so hashes alone were")):
        assert f"ok: the run is unchanged; {said}" in run(capsys, "verify", whole, "--steps", steps).out


def test_a_log_that_was_forged_together_with_the_certificate_fails_in_the_replay(capsys, copy):
    change_log(copy)
    write_certificate(copy)
    status, found, _ = verify(capsys, copy.root, "--steps", 8)
    assert status == 2
    [change] = found["changed"]
    assert change["what"] == "step"
    assert change["where"].startswith("step 5: loss ")


def test_another_base_model_is_named(capsys, copy, tmp_path, tiny_model):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    copy.recipe.write_text(copy.recipe.read_text().replace(str(tiny_model), str(other)))
    write_certificate(copy)  # so that only the model differs
    change_weight(other / "model.safetensors")
    _, found, _ = verify(capsys, copy.root)
    assert [one["what"] for one in found["changed"]] == ["base model"]


def test_a_run_from_another_kind_of_processor_is_compared_within_a_bound(capsys, copy):
    content = json.loads(copy.certificate.read_text())
    content["machine"]["processor"] = "another"
    copy.certificate.write_text(json.dumps(content))
    status, found, _ = verify(capsys, copy.root)
    assert (status, found["replayed"]) == (0, 2)
    assert any("within a bound" in note for note in found["notes"])


def test_a_run_of_more_processes_than_cores_is_compared_by_hashes(capsys, copy, monkeypatch):
    for checkpoint in copy.list_checkpoints():
        (checkpoint / "written_by.json").write_text(json.dumps({"strategy": "vanilla", "processes": 8}))
    write_certificate(copy)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    status, found, _ = verify(capsys, copy.root)
    assert (status, found["replayed"]) == (0, 0)
    assert "no step was replayed: training.processes: 8 processes" in found["notes"][0]


HOSTILE = {
    "types": lambda content: content["log"].update(count="many"),
    "endless block": lambda content: content["log"].update(block=0),
    "other folders": lambda content: content.update(checkpoints={"../../..": {}}),
    "no checkpoint": lambda content: content.update(checkpoints={}),
    "no machine": lambda content: content.update(machine={}),
    "no split": lambda content: content["rows"].pop("test"),
    "a list": lambda content: content.update(checkpoints={"checkpoint-4": []}),
    "more fields": lambda content: content.update(another=1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_certificate_is_refused(capsys, copy, name):
    content = json.loads(copy.certificate.read_text())
    HOSTILE[name](content)
    copy.certificate.write_text(json.dumps(content))
    assert "this certificate is damaged" in refused(capsys, "verify", copy.root)


def test_a_certificate_of_very_long_lists_takes_no_time(capsys, copy):
    content = json.loads(copy.certificate.read_text())
    content["log"].update(count=1 << 60, block=1 << 50, digests="")
    copy.certificate.write_text(json.dumps(content))
    _, found, _ = verify(capsys, copy.root)
    assert len(found["changed"]) == 21
    assert found["changed"][-1] == {"what": "log line", "where": "and more"}


def test_what_is_no_ended_run_is_refused(capsys, copy):
    assert "this is not a run folder" in refused(capsys, "verify", copy.root.parent)
    content = copy.certificate.read_text()
    copy.certificate.write_text(content[:100])
    assert "this file is damaged" in refused(capsys, "verify", copy.root)
    copy.certificate.write_text(content.replace('"machine"', '"engine"'))
    assert "this certificate is damaged" in refused(capsys, "verify", copy.root)
    copy.certificate.unlink()
    assert "an earlier version of MiniSFT trained this run" in refused(capsys, "verify", copy.root)
    shutil.rmtree(copy.model)
    assert "this run has not ended" in refused(capsys, "verify", copy.root)
    assert "must be at least 0" in refused(capsys, "verify", copy.root, "--steps", -1)
