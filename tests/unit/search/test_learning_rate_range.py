"""The learning-rate range test: on curves whose answer is known, and on a tiny model with the real trainer."""

import hashlib
import json
import math
import tempfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import minisft
from minisft.errors import UserError
from minisft.recipe import load_recipe
from minisft.search.learning_rate_range import find_bracket, learning_rate_range, range_lines
from minisft.training.trainer import SupervisedTokenTrainer
from tests.tiny import write_conversations, write_recipe, write_tiny_model

TRAINING = "{batch_size: 2, gradient_accumulation: 2, epochs: 1, max_grad_norm: null, precision: fp32}"


def curve(rates, noise=0.0, seed=0):
    """Loss 3 below 1e-5, falling to 2 at 1e-3, rising steeply from there on."""
    x = np.log10(rates)
    loss = 3 - np.clip((x + 5) / 2, 0, 1) + 4 * np.clip(x + 3, 0, None) ** 2
    return [float(one) for one in loss + np.random.default_rng(seed).normal(0, noise, len(x))]


def ends(found):
    """The ends of the suggested bracket, of which there must be one."""
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("steps", [16, 50])
def test_the_bracket_lies_between_the_begin_of_the_fall_and_its_end(steps, noise):
    rates = [float(rate) for rate in np.geomspace(1e-6, 1e-1, steps)]
    for seed in range(5):
        found = find_bracket(rates, curve(rates, noise, seed))
        low, high = ends(found)
        assert 3e-6 < low < 1e-4
        assert 3e-4 < high < 5e-3
        assert 10 <= high / low <= 100.001
        assert 2e-3 < (found.divergence or 0) < 2e-2


def test_a_loss_that_is_not_finite_is_divergence_at_its_rate():
    rates = [float(rate) for rate in np.geomspace(1e-6, 1e-3, 20)]
    found = find_bracket(rates, [*curve(rates)[:-1], math.nan])
    assert found.divergence == rates[-1]
    assert math.isnan(found.smoothed[-1])
    assert ends(found)[1] < 1e-3
    assert "diverges at 1.0e-03" in range_lines(found)


@pytest.mark.parametrize("losses", [[3.0] * 20, [3.0 + 0.1 * step for step in range(20)], [math.nan], []])
def test_a_loss_that_falls_at_no_rate_gives_no_bracket(losses):
    rates = [float(rate) for rate in np.geomspace(1e-6, 1e-1, 20)][: len(losses)]
    found = find_bracket(rates, losses)
    assert (found.low, found.high) == (None, None)
    if losses:
        assert range_lines(found)[-1].startswith("no bracket")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A recipe on a tiny model, and the hash of the model's files."""
    folder = tmp_path_factory.mktemp("tiny")
    model = write_tiny_model(folder / "model")
    recipe = load_recipe(write_recipe(folder, model, write_conversations(folder / "talks.jsonl", 40), TRAINING), ())
    return recipe, model


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder of temporary folders, and a trainer that fails if it writes a checkpoint."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def refuse(*args):
        raise AssertionError("a checkpoint was written")

    monkeypatch.setattr(SupervisedTokenTrainer, "_save_checkpoint", refuse)
    return tmp_path


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_rate_rises_by_one_factor_and_nothing_is_left_behind(tiny, scratch):
    recipe, model = tiny
    before = content(model)
    found = learning_rate_range(recipe, low=1e-5, high=1e-1, steps=20)
    assert found.rates == pytest.approx(np.geomspace(1e-5, 1e-1, 20)[: len(found.rates)])
    low, high = ends(found)
    assert 1e-5 <= low < high <= 1e-1
    assert found.smoothed[0] > min(found.smoothed)
    assert content(model) == before
    assert list(scratch.iterdir()) == []
    assert not (model.parent / "run").exists()


def test_the_first_loss_is_that_of_a_run_and_processes_only_split_the_batch(tiny, tmp_path, scratch, monkeypatch):
    recipe, _ = tiny
    found = learning_rate_range(recipe, low=1e-5, high=1e-1, steps=16)
    split = replace(recipe.training, processes=2, gradient_accumulation=1, strategy="zero2", offload="optimizer")
    assert learning_rate_range(replace(recipe, training=split), low=1e-5, high=1e-1, steps=16).losses == found.losses
    monkeypatch.undo()
    minisft.train(replace(recipe, output=str(tmp_path / "run"), training=replace(recipe.training, max_steps=1)))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert found.losses[0] == pytest.approx(line["loss"], rel=1e-6)


def test_a_rate_that_destroys_the_model_is_reported_as_divergence(tiny, scratch):
    found = learning_rate_range(tiny[0], low=1e25, high=1e30, steps=16)
    assert found.divergence is not None
    assert len(found.losses) < 16
    assert found.low is None
    assert list(scratch.iterdir()) == []


def test_without_a_number_of_steps_the_time_decides_within_bounds(tiny, scratch):
    found = learning_rate_range(tiny[0], low=1e-6, high=1e-5, seconds=0.0)
    assert len(found.rates) == 16
    assert (found.rates[0], found.rates[-1]) == (1e-6, 1e-5)
    assert all(later >= earlier for earlier, later in pairwise(found.rates))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"low": 1e-2, "high": 1e-3}, "0.01 to 0.001 is no range"),
        ({"low": 0.0}, "is no range"),
        ({"high": math.nan}, "is no range"),
        ({"steps": 3}, "3 steps are too few"),
    ],
)
def test_an_impossible_range_is_refused(tiny, options, problem):
    with pytest.raises(UserError, match=problem):
        learning_rate_range(tiny[0], **options)


def test_what_training_refuses_is_refused_here_too(tiny, scratch):
    recipe, _ = tiny
    gone = replace(recipe, data=replace(recipe.data, source="gone.jsonl"))
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        learning_rate_range(gone)
    assert list(scratch.iterdir()) == []
