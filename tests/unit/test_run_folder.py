"""A run folder is one recipe's, one process's at a time, and never overwritten unasked."""

import fcntl
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from minisft.errors import UserError
from minisft.recipe import DataRecipe, Recipe, TrainingRecipe
from minisft.run_folder import RunFolder, is_same_run, load_run, record_base_model, run_identity
from minisft.run_start import open_run, start_run


@pytest.fixture
def recipe(tmp_path):
    return Recipe(model="m", output=str(tmp_path / "run"), data=DataRecipe(source="d"))


def begin(recipe):
    with open_run(recipe) as run:
        run.metrics.write_text('{"step": 1}\n')
    return run


def finish(recipe):
    run = begin(recipe)
    run.model.mkdir()
    (run.model / "config.json").touch()
    return run


def test_the_resolved_recipe_is_in_the_folder(recipe):
    with open_run(recipe) as run:
        assert load_run(run.root) == recipe
    assert is_same_run(run, recipe)


def test_what_leaves_the_trajectory_alone_may_change(recipe):
    split = replace(recipe.training, strategy="zero2", processes=2, batch_size=2, gradient_accumulation=2, save_every=9)
    assert run_identity(replace(recipe, training=split)) == run_identity(recipe)


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"batch_size": 4}, {"epochs": 1.0}])
def test_another_recipes_run_is_kept(recipe, change):
    begin(recipe)
    other = replace(recipe, training=replace(TrainingRecipe(), **change))
    with pytest.raises(UserError, match="holds another recipe's run") as caught, open_run(other, resume=True):
        pass
    assert next(iter(change)) in str(caught.value)
    assert "--force" in str(caught.value)


def test_an_unfinished_run_wants_resume(recipe):
    begin(recipe)
    with pytest.raises(UserError, match="unfinished run.*--resume|--resume"), open_run(recipe):
        pass
    with open_run(recipe, resume=True) as run:
        assert run.metrics.exists()


def test_a_trained_run_is_never_overwritten_unasked(recipe):
    finish(recipe)
    for resume in (False, True):
        with pytest.raises(UserError, match="trained already"), open_run(recipe, resume=resume):
            pass
    with open_run(recipe, prepares_only=True) as run:
        assert run.is_trained()
    with start_run(recipe, force=True) as started:
        assert not started.run.has_begun()
        assert run.is_trained()


def test_a_folder_that_is_no_run_is_left_alone(recipe):
    root = RunFolder(Path(recipe.output)).root
    root.mkdir()
    (root / "thesis.tex").touch()
    for force in (False, True):
        with pytest.raises(UserError, match="not a run, and not empty.*thesis.tex"), start_run(recipe, force=force):
            pass
    assert [path.name for path in root.iterdir()] == ["thesis.tex"]


def test_output_that_is_a_file_is_refused(recipe, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"), open_run(recipe):
        pass


def test_nothing_to_resume(recipe):
    with pytest.raises(UserError, match="no run to resume"), open_run(recipe, resume=True):
        pass


def test_one_process_at_a_time(recipe):
    with open_run(recipe), pytest.raises(UserError, match="another process"), open_run(recipe):
        pass


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path)


def test_force_and_resume_together_delete_nothing(recipe):
    run = begin(recipe)
    with pytest.raises(UserError, match="give one of them"), start_run(recipe, force=True, resume=True):
        pass
    assert run.metrics.exists()


def test_a_recipe_of_the_users_own_is_not_overwritten(recipe):
    root = Path(recipe.output)
    root.mkdir()
    (root / "recipe.yaml").write_text("# mine\nmodel: m\noutput: run\ndata: {source: d}\n")
    for force in (False, True):
        with pytest.raises(UserError, match=r"not a run, and not empty.*recipe.yaml"), start_run(recipe, force=force):
            pass
    assert (root / "recipe.yaml").read_text().startswith("# mine")


@pytest.mark.parametrize("name", ["run #1", "123", "on", "a: b", "[x"])
def test_any_folder_name_will_do(recipe, tmp_path, name):
    named = replace(recipe, output=str(tmp_path / name))
    with open_run(named) as run:
        assert load_run(run.root) == named


def test_preparing_leaves_the_recipe_of_a_trained_run_alone(recipe):
    run = finish(recipe)
    other = replace(recipe, training=replace(recipe.training, strategy="zero2"))
    with open_run(other, prepares_only=True):
        pass
    assert load_run(run.root).training.strategy == "vanilla"


def test_another_base_model_is_noticed(recipe):
    with open_run(recipe) as run:
        record_base_model(run, "the hub's m", "abc")
        record_base_model(run, "the hub's m", "abc")
        with pytest.raises(UserError, match="not the same"):
            record_base_model(run, "the folder m", "def")


def test_one_that_only_looks_at_the_lock_is_waited_for(recipe, tmp_path):
    """`evaluate --follow` takes the lock for a moment."""
    with open_run(recipe) as run:
        pass
    with (run.root / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with open_run(recipe):
            pass
    with open_run(recipe), pytest.raises(UserError, match="another process is at work"), open_run(recipe):
        pass
