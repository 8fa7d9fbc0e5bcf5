"""What fits the machine: the disk, and the time of an answer beside the time of a training step."""

import numpy as np
import pytest

from minisft.new_recipe.machine_fit import answer_seconds, choose_disk, fit_to_machine, processes_of_machine
from minisft.recipe import make_recipe
from minisft.training.batching import Sizes


@pytest.fixture
def recipe(tiny_model, tmp_path):
    return make_recipe(
        [("model", str(tiny_model)), ("output", str(tmp_path / "run")), ("data.source", "x.jsonl"),
         ("training.epochs", 3)]
    )  # fmt: skip


@pytest.mark.parametrize(("free", "checkpoints", "keep"), [(1 << 40, 3, None), (1 << 20, 3, 1), (1 << 20, 1, None)])
def test_fewer_checkpoints_are_kept_where_the_disk_is_small(recipe, tiny_model, free, checkpoints, keep):
    text, kept = choose_disk(recipe, tiny_model, checkpoints, here=True, free_space=lambda _: free)
    assert kept == keep
    assert " of disk, " in text
    assert text.endswith(" free")


def test_the_disk_of_another_machine_is_unknown(recipe, tiny_model):
    text, kept = choose_disk(recipe, tiny_model, 3, here=False, free_space=lambda _: 0)
    assert kept is None
    assert text.endswith(" of disk")


def test_a_small_model_is_trained_in_full_by_one_process(recipe):
    sizes = Sizes(np.full(100, 50), np.full(100, 20))
    run = fit_to_machine(recipe, sizes, "h100")
    assert run.prediction.fits
    assert run.recipe.training.strategy == "vanilla"
    assert run.recipe.training.lora is None
    assert not run.recipe.training.gradient_checkpointing
    assert run.reason.startswith("full fine-tuning with vanilla fits")
    assert run.prediction.steps == 39


def test_an_answer_takes_longer_the_more_it_has_to_write(recipe):
    from minisft.data.stats import DatasetStats
    from minisft.new_recipe.data_survey import TokenSurvey

    run = fit_to_machine(recipe, Sizes(np.full(100, 50), np.full(100, 20)), "h100")
    tokens = TokenSurvey(
        "chatml", ("</s>",), 1, np.array([50]), np.array([20]), np.array([20]), np.array([50]), np.array([True]), 20,
        {}, DatasetStats(),
    )  # fmt: skip
    # A decoding step of a batch of 64 takes 30 ms, however small the model is.
    assert answer_seconds(run.job, tokens, 100) == pytest.approx(100 * 0.03 / 64)
    assert answer_seconds(run.job, tokens, 200) == pytest.approx(200 * 0.03 / 64)


def test_processes_as_asked_for_or_one():
    assert processes_of_machine("h100", 8) == 8
    assert processes_of_machine("h100", None) == 1
