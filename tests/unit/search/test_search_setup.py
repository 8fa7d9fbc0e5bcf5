"""What must stay the same when a search goes on, and the split that trials with different seeds share."""

import pytest

from minisft.recipe import make_recipe
from minisft.search.search_setup import search_identity, with_fixed_split, with_validation
from minisft.search.space import read_axis


@pytest.fixture(scope="module")
def recipe():
    return make_recipe([("model", "m"), ("output", "o"), ("data.source", "d.jsonl"), ("seed", 3)])


def identity(recipe, option):
    axes = [read_axis(option)]
    return search_identity(with_validation(with_fixed_split(recipe, axes), None), axes, 0, "loss")


def test_trials_with_other_seeds_have_the_split_of_the_recipe(recipe):
    assert with_fixed_split(recipe, [read_axis("seed=0,1")]).data.seed == 3
    assert with_fixed_split(recipe, [read_axis("training.epochs=1,2")]) == recipe


@pytest.mark.parametrize(
    ("option", "changed", "is_same"),
    [
        ("training.epochs=1,2", ("training.epochs", 5), True),
        ("training.epochs=1,2", ("training.learning_rate", 1.0), False),
        ("training.epochs=1,2", ("seed", 4), False),
        ("seed=0,1", ("seed", 4), False),  # it would change the split
        ("seed=0,1", ("data.seed", 3), True),
        ("data.max_length=100,200", ("data.max_length", 100), False),  # it would change the validation rows
    ],
)
def test_a_search_goes_on_unless_what_its_trials_share_has_changed(recipe, option, changed, is_same):
    assert (identity(recipe, option) == identity(make_recipe([changed], recipe), option)) is is_same


def test_validation_rows_are_taken_from_the_train_rows(recipe):
    assert with_validation(recipe, None).data.validation_fraction == 0.1
    assert with_validation(recipe, 0.3).data.validation_fraction == 0.3
    own = with_validation(make_recipe([("data.test", "t.jsonl")], recipe), 0.2).data
    assert (own.test, own.test_fraction, own.validation_fraction) == (None, 0.2, None)
