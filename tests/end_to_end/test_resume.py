"""`--resume` from damaged checkpoints, which is refused with the file's name, and beyond the end that a run had."""

import json
import shutil

import pytest

from minisft.run_folder import RunFolder
from tests.command import refused, run


@pytest.fixture(scope="module")
def halfway(tmp_path_factory, tiny_model, conversations):
    """Return recipe and folder of a run of 8 steps that was stopped after its checkpoint of step 4."""
    from minisft.cli import main

    folder = tmp_path_factory.mktemp("halfway")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\noutput: {folder / 'run'}\n"
        f"data: {{source: {conversations}, template: mistral, max_length: 256}}\n"
        "training: {epochs: 2, learning_rate: 1.0e-3, precision: fp32, keep_optimizer: all}\n"
    )
    assert main(["train", str(recipe)]) == 0
    stopped = RunFolder(folder / "run")
    shutil.rmtree(stopped.model)
    shutil.rmtree(stopped.checkpoints / "checkpoint-8")
    return recipe, stopped.root


@pytest.fixture
def damage(halfway, tmp_path, capsys):
    """Copy the run, let a function damage its checkpoint, and return what `--resume` says."""
    recipe, whole = halfway

    def resume(spoil):
        copy = tmp_path / "run"
        shutil.copytree(whole, copy)
        spoil(copy / "checkpoints" / "checkpoint-4")
        return refused(capsys, "train", recipe, f"output={copy}", "--resume")

    return resume


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def test_another_number_of_threads_is_refused(damage):
    def trained_with_more(checkpoint):
        record = checkpoint.parents[1] / "environment.json"
        found = json.loads(record.read_text())
        assert found["threads"] == 1  # as tests/conftest.py sets
        record.write_text(json.dumps(found | {"threads": 3}))

    said = damage(trained_with_more)
    assert "OMP_NUM_THREADS: the run was trained with 3 threads a process, and would go on with 1" in said
    assert "set it to 3" in said


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "written_by.json", "model.safetensors"],
)
@pytest.mark.parametrize("how", [cut, empty])
def test_a_damaged_checkpoint_is_named_with_its_file(damage, name, how):
    said = damage(lambda checkpoint: how(checkpoint / name))
    assert "checkpoint-4: this checkpoint is damaged" in said
    assert f"{name} cannot be read" in said
    assert ("it is empty" in said) == (how is empty)
    assert "--force" in said


def test_a_schedule_that_is_gone_is_missed(damage):
    assert "scheduler.pt is missing" in damage(lambda checkpoint: (checkpoint / "scheduler.pt").unlink())


def test_an_earlier_checkpoint_is_offered(damage):
    def spoil(checkpoint):
        shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-2"))
        empty(checkpoint / "optimizer.pt")

    assert "remove checkpoint-4: --resume then continues from checkpoint-2" in damage(spoil)


def as_zero(checkpoint, shards=2):
    """Make the checkpoint one of ZeRO-2 on two processes, as far as its files' names go."""
    (checkpoint / "written_by.json").write_text(json.dumps({"strategy": "zero2", "processes": 2}))
    folder = checkpoint / "global_step4"
    folder.mkdir()
    for rank in range(shards):
        shutil.copy(checkpoint / "optimizer.pt", folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (checkpoint / "latest").write_text(folder.name)
    return folder


@pytest.mark.parametrize("how", [cut, empty])
def test_a_damaged_shard_is_named(damage, how):
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert f"global_step4/{name} cannot be read" in damage(lambda checkpoint: how(as_zero(checkpoint) / name))


def test_a_missing_shard_is_named(damage):
    assert "zero_pp_rank_1_mp_rank_*optim_states.pt is missing" in damage(lambda checkpoint: as_zero(checkpoint, 1))


def test_bytes_changed_inside_a_state_are_no_traceback(damage):
    def spoil(checkpoint):
        content = bytearray((checkpoint / "optimizer.pt").read_bytes())
        at = content.find(b"data.pkl") + 20
        content[at : at + 40] = bytes(40)
        (checkpoint / "optimizer.pt").write_bytes(content)

    assert "it is damaged" in damage(spoil)


# --- beyond the end


LONGER = {
    "epochs": ("training.epochs=1", "training.epochs=3"),
    "steps": ("training.max_steps=3", "training.max_steps=9"),
}


@pytest.mark.parametrize("kind", LONGER)
def test_a_run_made_longer_equals_one_that_was_longer_from_the_start(capsys, recipe_file, tmp_path, kind):
    """Its weights have the same bits, and its lines the same numbers."""
    short, long = LONGER[kind]
    constant = ["training.scheduler=constant", "training.save_every=3"]
    whole, grown = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "grown")
    assert run(capsys, "train", recipe_file, f"output={whole.root}", long, *constant)[0] == 0
    assert run(capsys, "train", recipe_file, f"output={grown.root}", short, *constant)[0] == 0
    assert "--resume makes it longer" in refused(capsys, "train", recipe_file, f"output={grown.root}", long, *constant)
    status, _, said = run(capsys, "train", recipe_file, f"output={grown.root}", long, *constant, "--resume")
    assert status == 0, said
    assert lines(grown) == lines(whole)
    assert (grown.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    assert long.partition(".")[2].replace("=", ": ") in grown.recipe.read_text()


def lines(folder):
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"], line["epoch"]) for line in found]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["training.epochs=1"], "the learning rate of linear depends on the number of steps"),
        (["training.epochs=1", "training.scheduler=constant_with_warmup"], "the warm-up is a fraction of all steps"),
        (
            [
                "training.epochs=1",
                "training.scheduler=constant",
                "training.eval_every=epoch",
                "training.early_stopping=3",
            ],
            "early stopping decides",
        ),
    ],
)
def test_a_run_whose_steps_would_differ_is_not_made_longer(capsys, recipe_file, tmp_path, words, reason):
    assert run(capsys, "train", recipe_file, *words)[0] == 0
    before = {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"
    }
    longer = ["training.epochs=2", *words[1:]]
    assert reason in refused(capsys, "train", recipe_file, *longer, "--resume")
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_without_its_state_is_not_begun_again(capsys, recipe_file, tmp_path):
    constant = ["training.scheduler=constant"]
    assert run(capsys, "train", recipe_file, "training.epochs=1", *constant)[0] == 0
    (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "optimizer.pt").unlink()
    assert "no checkpoint is left" in refused(capsys, "train", recipe_file, *constant, "--resume")
    assert RunFolder(tmp_path / "run").is_trained()


def test_fewer_epochs_are_another_run(capsys, recipe_file):
    assert run(capsys, "train", recipe_file, "training.epochs=2", "training.scheduler=constant")[0] == 0
    said = refused(capsys, "train", recipe_file, "training.epochs=1", "training.scheduler=constant", "--resume")
    assert "holds another recipe's run: training.epochs" in said
    assert "makes it longer" not in said
