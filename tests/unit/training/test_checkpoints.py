"""Which checkpoints stay, what they keep, and that none is ever seen half written or half removed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from minisft.data.preparation import prepare
from minisft.recipe import load_recipe
from minisft.run_folder import RunFolder
from minisft.training.checkpoints import (
    drop_optimizer_states,
    latest_resumable,
    prune_checkpoints,
    publish,
    publish_final_model,
    remove_checkpoint,
    remove_unfinished,
    staging_folder,
)
from minisft.training.run_training import make_trainer


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints after steps 2, 4, 6 and 8, each with its state."""
    run = RunFolder(tmp_path)
    for step in (2, 4, 6, 8):
        write(run.checkpoints / f"checkpoint-{step}", f"weights {step}")
    return run


def write(folder, text):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    (folder / "config.json").write_text("{}")
    (folder / "optimizer.pt").touch()
    (folder / "global_step1").mkdir()


def names(run):
    return [path.name.removeprefix("checkpoint-") for path in run.list_checkpoints()]


def score(run, losses, best):
    entries = [{"checkpoint": f"checkpoint-{step}", "loss": loss} for step, loss in losses.items()]
    (run.root / "evaluation").mkdir(exist_ok=True)
    results: dict[str, object] = {
        "base": {},
        "constant": {},
        "checkpoints": entries,
        "best": best and f"checkpoint-{best}",
    }
    (run.root / "evaluation" / "results.json").write_text(json.dumps(results))


def test_the_newest_stay(run):
    prune_checkpoints(run, 2)
    assert names(run) == ["6", "8"]
    prune_checkpoints(run, 1)
    assert names(run) == ["8"]


def test_the_best_checkpoints_are_kept(run):
    score(run, {2: 1.5, 4: 1.2, 6: None}, best=2)
    prune_checkpoints(run, 1)
    assert names(run) == ["2", "4", "8"], "the highest BLEU, the lowest loss, the newest"


def test_a_best_that_is_gone_or_unknown_is_no_obstacle(run):
    score(run, {1: 0.1, 4: 1.2}, best=None)
    prune_checkpoints(run, 1)
    assert names(run) == ["4", "8"]
    score(run, {}, best=None)
    prune_checkpoints(run, 1)
    assert names(run) == ["8"]


def test_only_one_keeps_its_state(run):
    drop_optimizer_states(run.checkpoints, keep=run.checkpoints / "checkpoint-8")
    assert latest_resumable(run.checkpoints) == run.checkpoints / "checkpoint-8"
    assert {path.name for path in (run.checkpoints / "checkpoint-6").iterdir()} == {"model.safetensors", "config.json"}


def test_a_removal_that_is_cut_off_leaves_no_half_checkpoint(run, monkeypatch):
    def die(path, **options):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(run.checkpoints / "checkpoint-4")
    monkeypatch.undo()
    assert names(run) == ["2", "6", "8"]
    remove_unfinished(run.checkpoints)
    assert len(list(run.checkpoints.iterdir())) == 3


def test_one_of_the_same_step_is_replaced(run):
    write(staging_folder(run.checkpoints) / "checkpoint-4", "new")
    publish(staging_folder(run.checkpoints) / "checkpoint-4", run.checkpoints / "checkpoint-4")
    assert (run.checkpoints / "checkpoint-4" / "model.safetensors").read_text() == "new"
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]


def test_the_model_is_the_newest_checkpoint_or_absent(run):
    (run.root / ".model.123").mkdir()  # a killed process left it
    unreadable = run.checkpoints / "checkpoint-8" / "vocabulary.txt"
    unreadable.symlink_to("nowhere")
    with pytest.raises(OSError, match=r"vocabulary\.txt"):
        publish_final_model(run)
    assert [path.name for path in run.root.iterdir()] == ["checkpoints"]
    unreadable.unlink()
    publish_final_model(run)
    assert (run.model / "model.safetensors").read_text() == "weights 8"
    assert not (run.model / "optimizer.pt").exists()


def test_left_overs_are_no_checkpoints(run):
    shutil.copytree(run.checkpoints / "checkpoint-8", staging_folder(run.checkpoints) / "checkpoint-10")
    assert names(run) == ["2", "4", "6", "8"]
    remove_unfinished(run.checkpoints)
    assert not staging_folder(run.checkpoints).exists()


@pytest.fixture
def trainer(recipe_file):
    recipe = load_recipe(recipe_file, [])
    prepare(recipe)
    return make_trainer(recipe, RunFolder(Path(recipe.output)))


@pytest.mark.parametrize(
    ("strategy", "copies"), [("zero1", [1, 0]), ("zero2", [1, 0]), ("zero3", [1, 1])], ids=["zero1", "zero2", "zero3"]
)
def test_only_the_process_that_writes_copies_weights_that_all_have(trainer, strategy, copies, monkeypatch):
    """Under ZeRO-3 the copy is a gather, in which every process takes part."""
    trainer.strategy, trainer.is_deepspeed_enabled = strategy, True
    trainer.deepspeed = trainer.model_wrapped = SimpleNamespace(config={}, save_checkpoint=lambda folder: None)
    monkeypatch.setattr(trainer, "_save", lambda *words, **options: None)
    for rank, expected in enumerate(copies):
        copied: list[object] = []
        monkeypatch.setattr(trainer.accelerator, "get_state_dict", copied.append)
        monkeypatch.setattr(type(trainer.args), "should_save", rank == 0)
        trainer.save_model("folder")
        assert len(copied) == expected
