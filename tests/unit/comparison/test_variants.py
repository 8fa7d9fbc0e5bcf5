"""The variants that the options of compare give: their names, folders and overrides."""

from pathlib import Path

import pytest

from minisft.comparison.variants import choose_variants, read_axes, refuse_other_run, trajectory
from minisft.errors import UserError
from minisft.run_start import open_run


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: m\noutput: {tmp_path / 'out'}\ndata: {{source: s}}\n")
    return path


def choose(recipe, strategies=None, varied=(), overrides=()):
    return choose_variants(recipe, overrides, read_axes(strategies, varied))


def test_the_four_strategies_are_the_default(recipe, tmp_path):
    variants = choose(recipe)
    assert [variant.name for variant in variants] == ["vanilla", "zero1", "zero2", "zero3"]
    assert [variant.recipe.training.strategy for variant in variants] == ["vanilla", "zero1", "zero2", "zero3"]
    assert Path(variants[2].recipe.output) == tmp_path / "out" / "compare" / "zero2"
    assert len({trajectory(variant) for variant in variants}) == 1


def test_overrides_hold_for_all_variants(recipe):
    variants = choose(recipe, "vanilla,zero2", overrides=["training.processes=2", "seed=3"])
    assert [(v.recipe.training.processes, v.recipe.seed) for v in variants] == [(2, 3), (2, 3)]


def test_each_value_of_a_key_is_a_variant(recipe):
    variants = choose(recipe, varied=["training.learning_rate=1e-4,2e-4"])
    assert [variant.name for variant in variants] == ["learning_rate-1e-4", "learning_rate-2e-4"]
    assert [variant.recipe.training.learning_rate for variant in variants] == [1e-4, 2e-4]
    assert {variant.recipe.training.strategy for variant in variants} == {"vanilla"}
    assert len({trajectory(variant) for variant in variants}) == 2


def test_every_combination_of_values_is_a_variant(recipe):
    variants = choose(recipe, "vanilla,zero1", ["seed=0,1"])
    assert [variant.name for variant in variants] == [
        "vanilla_seed-0", "vanilla_seed-1", "zero1_seed-0", "zero1_seed-1",
    ]  # fmt: skip
    assert len({trajectory(variant) for variant in variants}) == 2


def test_values_may_be_mappings_and_quoted_texts(recipe):
    variants = choose(recipe, varied=["training.lora={rank: 8},{rank: 16, alpha: 2}"])
    assert [variant.recipe.training.lora.rank for variant in variants] == [8, 16]
    assert all("/" not in variant.name and " " not in variant.name for variant in variants)
    variants = choose(recipe, varied=["data.source='a,b','../x/y'"])
    assert [variant.recipe.data.source for variant in variants] == ["a,b", "../x/y"]
    assert all(Path(variant.recipe.output).parent.name == "compare" for variant in variants)


def test_names_of_variants_are_distinct(recipe):
    assert [v.name for v in choose(recipe, varied=["data.source=a/b,a:b"])] == ["source-a-b", "source-a-b-2"]


def test_an_invalid_variant_is_kept_with_its_error(recipe):
    good, bad = choose(recipe, varied=["training.batch_size=2,-1"])
    assert good.recipe.training.batch_size == 2
    assert bad.recipe is None
    assert "-1 is not above zero" in bad.error
    assert trajectory(good) != trajectory(bad)


@pytest.mark.parametrize(
    ("strategies", "varied", "said"),
    [
        ("zero5", [], "there is no strategy 'zero5'"),
        ("", [], "it lists no strategy"),
        ("vanilla,vanilla", [], "the value vanilla occurs twice"),
        (None, ["seed"], "it lists no values"),
        (None, ["seed="], "it lists no values"),
        (None, ["seed=[1"], "its values cannot be read"),
        (None, ["seed=1", "seed=2"], "this key is varied twice"),
        ("vanilla", ["training.strategy=zero1"], "this key is varied twice"),
        (None, ["output=a,b"], "each variant already has an output folder of its own"),
        (None, ["trainin.epochs=1,2"], "unknown key 'trainin'"),
    ],
)
def test_invalid_options_are_refused(recipe, strategies, varied, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        choose(recipe, strategies, varied)


def test_a_folder_with_a_run_of_other_settings_is_refused(recipe):
    """The trajectory would be the same, but the measured figures would not."""
    (variant,) = choose(recipe, "zero2", overrides=["training.processes=2", "training.batch_size=4"])
    with open_run(variant.recipe) as run:
        run.metrics.write_text("{}\n")
    refuse_other_run(variant)
    (other,) = choose(recipe, "zero2", overrides=["training.processes=1", "training.batch_size=8"])
    with pytest.raises(UserError, match=r"training.processes 2, but this variant has 1"):
        refuse_other_run(other)
    (saves,) = choose(
        recipe, "zero2", overrides=["training.processes=2", "training.batch_size=4", "training.save_every=5"]
    )
    refuse_other_run(saves)
