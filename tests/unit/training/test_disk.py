"""The disk that a run will take, computed before it starts."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from minisft.errors import UserError
from minisft.recipe import LoraRecipe, TrainingRecipe, load_recipe
from minisft.run_folder import RunFolder
from minisft.training.disk import (
    CheckpointSize,
    checkpoint_size,
    checkpoints_to_write,
    count_parameters,
    most_added,
    require_disk,
)

SIZE = CheckpointSize(model=10, state=3)


def training(**changes):
    return TrainingRecipe(**changes)


def test_parameters_are_counted_without_loading_them(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert count_parameters(tiny_model, None) == (parameters, parameters)
    layers = model.config.num_hidden_layers
    every, trained = count_parameters(tiny_model, LoraRecipe(rank=2, target_modules=["q_proj"]))
    assert trained == layers * 2 * (32 + 32)
    assert every == parameters + trained


@pytest.mark.parametrize(
    ("states", "count", "changes", "most"),
    [
        ([], 1, {}, 13 + 10),  # the model beside the only checkpoint
        ([], 4, {}, 43 + 10),
        ([], 4, {"keep_optimizer": "all"}, 52 + 10),
        ([False, True], 1, {}, 13 + 7),  # resumed: the older state goes
        ([], 9, {"keep_checkpoints": 2}, 3 * 10 + 13 + 3),  # two, the best, and the new one while two states are there
        ([], 9, {"keep_checkpoints": 1, "keep_optimizer": "all"}, 3 * 13),
        ([False, False, True], 5, {"keep_checkpoints": 2}, 13),  # one goes for each that comes
        ([True], 0, {}, 10),
    ],
)
def test_what_a_folder_grows_by(states, count, changes, most):
    assert most_added(states, count, SIZE, training(**changes)) == most


@pytest.mark.parametrize("begun_at", [0, 5, 8])
@pytest.mark.parametrize("changes", [
    {}, {"epochs": 2.5}, {"max_steps": 7}, {"save_every": 3}, {"save_every": 1, "max_steps": 10}, {"save_every": 100},
])  # fmt: skip
def test_checkpoints_are_counted_as_they_will_be_written(tmp_path, changes, begun_at):
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 30, "labels": [[-100, 2]] * 30})
    rows.save_to_disk(str(tmp_path / "dataset" / "train"))
    settings = training(**{"epochs": 3, **changes})  # epochs of 4 steps
    last = settings.max_steps or -(-settings.epochs * 4 // 1)
    every = 4 if settings.save_every == "epoch" else settings.save_every
    written = [step for step in range(begun_at + 1, int(last) + 1) if step % every == 0 or step == last]
    if begun_at < last:
        assert checkpoints_to_write(settings, RunFolder(tmp_path), begun_at, 99, 0) == len(written)


def test_a_run_without_room_is_refused(recipe_file, tiny_model, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 30, "labels": [[-100, 2]] * 30})
    rows.save_to_disk(str(tmp_path / "run" / "dataset" / "train"))
    recipe, run = load_recipe(recipe_file), RunFolder(tmp_path / "run")
    size = checkpoint_size(recipe, tiny_model)
    needed = 2 * size.model + max(size.model, size.state) + size.state  # checkpoints of two epochs, and model/
    require_disk(recipe, run, tiny_model, None, free_space=lambda folder: needed)
    with pytest.raises(UserError, match=r"the run needs .* for 2 checkpoints of .* free there") as caught:
        require_disk(recipe, run, tiny_model, None, free_space=lambda folder: needed - 1)
    assert caught.value.where == str(run.root)
    assert "training.keep_checkpoints" in caught.value.fix


def test_the_checkpoints_of_a_long_run_are_not_counted_one_by_one():
    assert most_added([], 10**30, SIZE, training(keep_checkpoints=2)) == most_added(
        [], 10, SIZE, training(keep_checkpoints=2)
    )
    assert most_added([True], 10**30, SIZE, training()) > 10**30
