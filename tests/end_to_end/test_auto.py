"""strategy=auto through the command line: tried, trained, resumed."""

import shutil

import pytest

from minisft.planning.auto import job_of, prepared_sizes, try_strategy
from minisft.planning.machines import machine_named
from minisft.recipe import load_recipe
from minisft.run_folder import RunFolder, load_run
from minisft.run_start import open_run
from tests.tiny import minisft

pytestmark = pytest.mark.long


def test_vanilla_for_a_model_that_fits_and_a_resume_without_a_trial(recipe_file, tmp_path):
    words = ("train", recipe_file, "training.strategy=auto", "training.save_every=2", "training.max_steps=4")
    done = minisft(*words)
    assert done.returncode == 0, done.stderr
    assert "strategy auto: vanilla fits" in done.stdout
    assert "in its trial" in done.stdout
    run = RunFolder(tmp_path / "run")
    assert load_run(run.root).training.strategy == "vanilla"
    assert [folder.name for folder in run.list_checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    shutil.rmtree(run.model)
    shutil.rmtree(run.list_checkpoints()[-1])
    done = minisft(*words, "--resume")
    assert "no checkpoint to resume from" in done.stdout or "resuming from" in done.stdout
    assert done.returncode == 0, done.stderr
    assert run.is_trained()


@pytest.mark.parametrize("strategy", ["vanilla", "zero3"])
def test_a_trial_in_two_processes(recipe_file, tmp_path, strategy):
    from minisft.data.preparation import prepare

    recipe = load_recipe(
        recipe_file, (f"training.strategy={strategy}", "training.processes=2", "training.batch_size=4")
    )
    with open_run(recipe) as run:
        prepare(recipe)
        trial = try_strategy(recipe, run, job_of(recipe, machine_named(None, 2), sizes=prepared_sizes(recipe)))
        assert trial.peak is not None
        assert 0.2e9 < trial.process < trial.peak < 2e9
        assert trial.seconds > 0
        assert not (run.root / ".trial").exists()
        assert not run.has_begun()
