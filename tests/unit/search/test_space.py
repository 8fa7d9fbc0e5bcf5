"""What `--vary` takes and refuses, and what is varied where nothing is named."""

import pytest

from minisft.errors import UserError
from minisft.recipe import make_recipe
from minisft.search.space import (
    Choices,
    Range,
    checked,
    combinations,
    count_combinations,
    default_options,
    holds,
    own_settings,
    read_axes,
    read_axis,
)

RATE = "training.learning_rate"


def is_logarithmic(option):
    axis = read_axis(option)
    return isinstance(axis, Range) and axis.logarithmic


def values(option):
    axis = read_axis(option)
    assert isinstance(axis, Choices)
    return [axis.value(text) for text in axis.texts]


@pytest.fixture(scope="module")
def recipe():
    return make_recipe([("model", "m"), ("output", "o"), ("data.source", "d.jsonl")])


def test_a_range_of_rates_is_logarithmic_and_a_range_of_whole_numbers_is_whole():
    assert read_axis(f"{RATE}=1e-5..5e-4") == Range(RATE, 1e-5, 5e-4)
    assert is_logarithmic(f"{RATE}=1e-5..2e-5")
    assert read_axis("training.epochs=1..3") == Range("training.epochs", 1, 3, whole=True)
    assert not is_logarithmic("training.epochs=1..30")
    assert not is_logarithmic("training.warmup_ratio=0.0..0.1")
    assert not is_logarithmic("training.max_grad_norm=1.0..2.0")
    assert is_logarithmic("training.max_grad_norm=0.1..2.0")


def test_a_list_holds_any_yaml():
    mappings = values("training.lora={rank: 8, alpha: 16},null,{rank: 64}")
    assert mappings == [{"rank": 8, "alpha": 16}, None, {"rank": 64}]
    lists = values("training.lora.target_modules=[q_proj, v_proj],all-linear")
    assert lists == [["q_proj", "v_proj"], "all-linear"]
    assert values(f"{RATE}=8e-6,1.0e-5") == [8e-6, 1e-5]


@pytest.mark.parametrize(
    ("option", "problem", "fix"),
    [
        ("training.learning_rat=1,2", "unknown key 'training.learning_rat'", f"did you mean '{RATE}'?"),
        ("learning_rate=1,2", "unknown key 'learning_rate'", f"did you mean '{RATE}'?"),
        ("training.lora.rnk=1,2", "unknown key", "did you mean 'training.lora.rank'?"),
        (f"{RATE}=1e-3..1e-5", "upside down", f"write --vary {RATE}=1e-05..0.001"),
        (f"{RATE}=1e-3..1e-3", "upside down or empty", "write --vary"),
        (RATE, "names no values", f"write --vary {RATE}=LOW..HIGH"),
        (f"{RATE}=", "names no values", "write --vary"),
        (f"{RATE}=1,1", "the value 1 occurs twice", "once"),
        ("data.max_lenght=1,2", "unknown key", "did you mean 'data.max_length'?"),
        ("data.template=chatml,llama3", "data.template cannot be varied: it changes the validation rows", "max_length"),
        ("data.limit=10,20", "data.limit cannot be varied: it changes the validation rows", "a search for each"),
        ("model=a,b", "model cannot be varied: losses of models with different tokenizers", "a search for each model"),
        ("evaluation.max_new_tokens=1,2", "cannot be varied: it does not change what is learned", "--objective"),
        ("output=a,b", "output cannot be varied: each trial has a folder of its own", "leave it out"),
        ("trust_remote_code=true,false", "cannot be varied", "leave it out"),
        ("training={epochs: 1},{epochs: 2}", "this is a section", "vary one of its keys"),
    ],
)
def test_what_cannot_be_varied_is_refused(option, problem, fix):
    with pytest.raises(UserError) as refused:
        read_axis(option)
    assert problem in refused.value.problem
    assert fix in refused.value.fix


@pytest.mark.parametrize("option", ["seed=0,1", "seed=0..9", "data.max_length=128,256", "data.overflow=turns,cut"])
def test_seed_and_keys_that_change_train_rows_only_can_be_varied(recipe, option):
    [axis] = read_axes([option], recipe)
    assert axis.key == option.partition("=")[0]


@pytest.mark.parametrize(
    "option", ["training.epochs=1,0", f"{RATE}=-1.0..1e-3", "training.batch_size=1.5,2", "training.lora={rank: 0},null"]
)
def test_every_value_is_checked_against_the_recipe_before_any_trial(recipe, option):
    with pytest.raises(UserError, match="--vary"):
        read_axes([option], recipe)


def test_combinations_that_cannot_work_are_refused_together(recipe):
    options = ["training.strategy=vanilla,zero3", "training.lora={load_in_4bit: true},null"]
    with pytest.raises(UserError, match="ZeRO-3 cannot shard"):
        read_axes(options, recipe)
    with pytest.raises(UserError, match="varied twice"):
        read_axes([f"{RATE}=1,2", f"{RATE}=3,4"], recipe)


def test_settings_of_a_space(recipe):
    axes = read_axes([f"{RATE}=1e-6..1e-4", "training.epochs=2,8", "training.batch_size=4..8"], recipe)
    own = own_settings(recipe, axes)
    assert own == {RATE: 8e-6, "training.epochs": 8, "training.batch_size": 8}
    assert holds(axes, own)
    assert not holds(axes, own | {RATE: 1.0})
    assert not holds(axes, own | {"training.epochs": 3})
    assert not holds(axes, own | {"training.batch_size": 4.5})
    assert count_combinations(axes) is None
    assert count_combinations(axes[1:]) == 10
    assert checked(recipe, own | {"training.epochs": 2}).training.epochs == 2


def test_combinations_are_in_order():
    axes = [Choices("a", ("1", "2")), Choices("b", ("x", "y"))]
    assert list(combinations(axes)) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip


def test_the_default_learning_rates_span_two_decades_around_the_rule(recipe):
    # 5e-5 x (2000 / 576)^0.781 = 1.32e-4 for SmolLM2-135M, and ten times that for LoRA
    assert default_options(recipe, 576)[0] == f"{RATE}=1.3e-05..0.0013"
    lora = make_recipe([("training.lora", {"rank": 8})], recipe)
    assert default_options(lora, 576)[0] == f"{RATE}=0.00013..0.013"
    assert default_options(lora, 2000)[0] == f"{RATE}=5e-05..0.005"
    assert default_options(lora, 576)[-1].startswith("training.lora.rank=")
    for options in (default_options(recipe, 576), default_options(lora, 576)):
        read_axes(options, lora)
