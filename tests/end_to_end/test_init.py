"""`minisft init` as a user has it: a recipe that trains, what it says, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

import minisft
from minisft.data.preparation import prepare
from minisft.recipe import load_recipe
from tests.command import refused, run
from tests.tiny import write_conversations

MODELS = Path(__file__).parents[1] / "unit" / "planning" / "models"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in an empty folder, where init writes recipe.yaml."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("talks") / "talks.jsonl", 60)


def sections(path="recipe.yaml"):
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def comments(path="recipe.yaml"):
    """Return all text of the comments, without their line ends."""
    return " ".join(line.strip(" #") for line in Path(path).read_text(encoding="utf-8").splitlines())


# --- a recipe that works ----------------------------------------------------------------------------------


def test_the_recipe_trains_evaluates_and_reports(capsys, here, talks, tiny_model):
    shutil.copy(talks, here / "talks.jsonl")
    status, out, err = run(capsys, "init", "talks.jsonl", "--model", tiny_model, "--yes")
    assert status == 0, err
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    made = sections()
    # 1. Every value has its reason in the line above it.
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line and not line.lstrip().startswith("#") and not line.endswith(":"):
            assert lines[number - 1].lstrip().startswith("# "), line
    # 2. Paths are as they were written, and the model decides on the template.
    assert made["data"]["source"] == "talks.jsonl"
    assert made["data"]["format"] == "sharegpt"
    assert made["data"]["template"] == "chatml"
    assert made["output"] == "outputs/talks"
    assert made["data"]["max_length"] <= 512
    # 3. What is printed last can be typed.
    printed = [line.strip() for line in out.splitlines() if line.startswith("  minisft ")]
    assert printed == [
        "minisft train recipe.yaml", "minisft evaluate outputs/talks", "minisft report outputs/talks",
    ]  # fmt: skip
    assert "60 rows in talks.jsonl, format sharegpt" in out
    assert "of training in" in out
    assert run(capsys, "train", "recipe.yaml", "training.max_steps=1").status == 0
    assert run(capsys, "evaluate", "outputs/talks", "evaluation.limit=2", "evaluation.max_new_tokens=4").status == 0
    assert run(capsys, "report", "outputs/talks").status == 0
    # 4. A second recipe gets an output of its own.
    assert run(capsys, "init", "talks.jsonl", "--model", tiny_model, "--output-recipe", "two.yaml").status == 0
    assert sections("two.yaml")["output"] == "outputs/talks-2"


def test_the_recipe_loses_few_answers(capsys, here, tiny_model):
    rows = [("short", 2)] * 196 + [("a long answer " * 25, 2)] * 4
    with Path("rows.jsonl").open("w") as file:
        for number, (text, turns) in enumerate(rows):
            messages = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": text}] * turns
            file.write(json.dumps({"messages": messages}) + "\n")
    assert run(capsys, "init", "rows.jsonl", "--model", tiny_model).status == 0
    ledger = prepare(load_recipe(Path("recipe.yaml"))).ledger
    assert ledger["rows"]["skipped"] == 0
    assert ledger["turns"]["supervised"] >= 0.98 * 400


def test_invalid_rows_are_repaired_and_the_recipe_says_why(capsys, here, talks, tiny_model):
    unanswered = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                    {"from": "human", "value": "c"}]}  # fmt: skip
    Path("rows.jsonl").write_text(talks.read_text() + json.dumps(unanswered) + "\n")
    status, out, _ = run(capsys, "init", "rows.jsonl", "--model", tiny_model)
    assert status == 0
    assert "unanswered_end 1; 1 of these rows can be repaired" in out
    assert sections()["data"]["invalid"] == "repair"
    assert "repair keeps 1 of them (unanswered_end_trimmed 1)" in comments()
    assert prepare(load_recipe(Path("recipe.yaml"))).ledger["rows"]["skipped"] == 0


@pytest.mark.parametrize("count", [1, 6])
def test_data_of_which_nothing_can_be_held_out_still_train(capsys, here, tiny_model, count):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * count)
    status, out, err = run(capsys, "init", "rows.jsonl", "--model", tiny_model)
    assert status == 0
    assert "no conversation can be held out" in err
    assert "minisft evaluate" not in out
    assert sections()["data"]["test_fraction"] == 0.0
    assert run(capsys, "train", "recipe.yaml", "training.max_steps=1").status == 0
    assert run(capsys, "report", "outputs/rows").status == 0


def test_a_recipe_elsewhere_has_full_paths(capsys, here, talks, tiny_model):
    shutil.copy(talks, here / "talks.jsonl")
    shutil.copytree(tiny_model, here / "model")
    (here / "sub").mkdir()
    words = ("init", "talks.jsonl", "--model", "model", "--output-recipe", "sub/r.yml")
    assert run(capsys, *words).status == 0
    made = sections("sub/r.yml")
    assert (made["data"]["source"], made["model"]) == (str(here / "talks.jsonl"), str(here / "model"))


def test_several_files_of_different_formats(capsys, here, talks, tiny_model):
    Path("alpaca.json").write_text(json.dumps([{"instruction": f"say {n}", "output": f"{n}"} for n in range(20)]))
    status, out, err = run(capsys, "init", talks, "alpaca.json", "--model", tiny_model)
    assert status == 0, err
    assert "80 rows" in out
    assert sections()["data"]["source"] == [str(talks), "alpaca.json"]
    assert "format" not in sections()["data"]
    assert prepare(load_recipe(Path("recipe.yaml"))).ledger["rows"]["read"] == 80


def test_rows_in_memory_in_python(here, tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes"}]}
            for n in range(30)]  # fmt: skip
    path = minisft.init(rows, model=tiny_model, output_recipe="mine.yaml")
    assert path == Path("mine.yaml")
    assert load_recipe(path).data.format == "messages"
    with pytest.raises(minisft.UserError, match="exists"):
        minisft.init(rows, model=tiny_model, output_recipe="mine.yaml")


# --- a machine that is not here ---------------------------------------------------------------------------


@pytest.fixture
def mistral(here, tiny_model):
    """Return a folder with the configuration of Mistral-7B, and a tokenizer."""
    shutil.copytree(MODELS / "mistral-7b", here / "mistral")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, here / "mistral" / name)
    return "mistral"


@pytest.mark.parametrize(
    ("words", "training"),
    [
        (["--gpu", "h100", "--count", 8], {"processes": 8, "learning_rate": 8e-6}),
        (["--gpu", "h100"], {"lora": {"rank": 16, "alpha": 32}, "learning_rate": 8e-5}),
        (["--gpu", "4090"], {"lora": {"rank": 16, "alpha": 32}, "learning_rate": 8e-5}),
    ],
)
def test_seven_billion_parameters_on_other_machines(capsys, talks, mistral, words, training):
    status, out, err = run(capsys, "init", talks, "--model", mistral, *words)
    assert status == 0, err
    made = sections()["training"]
    assert {key: made.get(key) for key in ("processes", "lora", "learning_rate") if key in made} == training
    assert (made["strategy"] == "vanilla") is (len(words) == 2)
    assert "another machine" in out
    assert "does not fit" not in err


def test_a_model_that_fits_nowhere_is_written_with_a_warning(capsys, talks, here, tiny_model):
    shutil.copytree(MODELS / "llama3-70b", here / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, here / "llama" / name)
    status, _, err = run(capsys, "init", talks, "--model", "llama", "--gpu", "4090", "--count", 2)
    assert status == 0
    assert "this recipe does not fit the machine. What would fit: " in err
    assert "does not fit the machine" in comments()


# --- what is refused --------------------------------------------------------------------------------------


def write(name, text):
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_data_that_cannot_be_used(capsys, talks, tiny_model):
    model = ("--model", tiny_model)
    assert "holds no rows" in refused(capsys, "init", write("empty.jsonl", ""), *model)
    assert "is empty" in refused(capsys, "init", write("empty.json", ""), *model)
    assert "not JSON" in refused(capsys, "init", write("text.jsonl", "some text\nand more\n"), *model)
    odd = write("odd.jsonl", '{"question": "a", "reply": "b"}\n')
    assert "its first row has the keys question, reply" in refused(capsys, "init", odd, *model)
    unanswered = write("unanswered.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')
    assert "none of the 1 rows is a conversation" in refused(capsys, "init", unanswered, *model)
    mixed = write("mixed.jsonl", talks.read_text() + '{"instruction": "a", "output": "b"}\n')
    assert "mixed.jsonl:61: the row is in the format alpaca" in refused(capsys, "init", mixed, *model)
    Path("nothing").mkdir()
    assert "holds no data" in refused(capsys, "init", "nothing", *model)
    assert not Path("recipe.yaml").exists()


def test_a_file_that_is_not_there_with_the_nearest_name(capsys, talks, tiny_model, here):
    shutil.copy(talks, here / "talks.jsonl")
    assert "did you mean talks.jsonl?" in refused(capsys, "init", "talk.jsonl", "--model", tiny_model)
    (here / "data").mkdir()
    shutil.copy(talks, here / "data" / "talks.jsonl")  # data/talk.jsonl could be an id of the hub
    assert "did you mean data/talks.jsonl?" in refused(capsys, "init", "data/talk.jsonl", "--model", tiny_model)
    assert "there is no such file" in refused(capsys, "init", "quite/other/name.jsonl", "--model", tiny_model)


def test_models_that_are_not_there(capsys, talks, here, tiny_model):
    assert "did you mean smollm2-135m?" in refused(capsys, "init", talks, "--model", "smollm-135m")
    shutil.copytree(tiny_model, here / "my-model")
    assert "did you mean my-model?" in refused(capsys, "init", talks, "--model", "my-modle")
    assert "there is no such folder" in refused(capsys, "init", talks, "--model", "/nothing/there")
    (here / "bare").mkdir()
    assert "no config.json" in refused(capsys, "init", talks, "--model", "bare")


def test_recipes_that_cannot_be_written(capsys, talks, tiny_model, here):
    model = ("--model", tiny_model)
    Path("recipe.yaml").write_text("mine")
    assert "this file exists, and is not replaced" in refused(capsys, "init", talks, *model)
    assert Path("recipe.yaml").read_text() == "mine"
    Path("recipe.yaml").unlink()
    Path("recipe.yaml").symlink_to("nowhere.yaml")
    assert "this file exists" in refused(capsys, "init", talks, *model)
    assert "ends in .yaml" in refused(capsys, "init", talks, *model, "--output-recipe", "recipe.txt")
    assert "no such folder" in refused(capsys, "init", talks, *model, "--output-recipe", "no/recipe.yaml")


def test_a_folder_without_write_permission(capsys, talks, tiny_model, here):
    folder = here / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    place = folder if os.geteuid() else Path("/proc")  # permissions do not stop root, but no file can be made in /proc
    err = refused(capsys, "init", talks, "--model", tiny_model, "--output-recipe", place / "recipe.yaml")
    assert "the recipe cannot be written there" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h1000"], "use one of h100, h100-pcie, h100-nvl, h200, "),
        (["--gpu", "h100", "--count", 9], "give at most --count 8"),
        (["--gpu", "h100", "--count", 0], "must be at least 1"),
        (["--gpu", "cpu", "--count", 9999], "cores on this machine"),
        (["data.limit=3"], "init takes data, and no keys of a recipe"),
        (["--force"], "--force"),
    ],
)
def test_options_that_cannot_be_met(capsys, talks, tiny_model, words, said):
    assert said in refused(capsys, "init", talks, "--model", tiny_model, *words)
    assert not Path("recipe.yaml").exists()


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has GPUs to count")
def test_a_number_of_gpus_where_there_are_none(capsys, talks, tiny_model):
    assert "this machine has no GPU" in refused(capsys, "init", talks, "--model", tiny_model, "--count", 2)


def test_nothing_is_named(capsys):
    assert "required" in refused(capsys, "init")
