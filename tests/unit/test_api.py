"""The Python API: what it exports, what it takes, what it refuses, and what comes back."""

import datetime
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pytest
from transformers import TrainerCallback

import minisft
from minisft.data.in_memory import source_of
from minisft.recipe import load_recipe, make_recipe

FUNCTIONS = ("train", "prepare", "evaluate", "export", "init", "plan", "check", "load", "push", "serve")
SETTINGS = {
    "data.template": "mistral", "data.max_length": 256, "training.max_steps": 2, "training.precision": "fp32",
    "evaluation.max_new_tokens": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINISFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(count=30):
    return [
        {
            "id": f"row-{n}",
            "messages": [{"role": "user", "content": f"{n} <b>"}, {"role": "assistant", "content": "yes"}],
        }
        for n in range(count)
    ]


# --- the package ------------------------------------------------------------------------------------------


def test_the_public_names_are_there_and_listed():
    assert {*FUNCTIONS, "Run", "PreparedData", "Recipe", "UserError", "__version__"} <= set(minisft.__all__)
    assert set(minisft.__all__) <= set(dir(minisft))
    assert all(getattr(minisft, name) is not None for name in minisft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        minisft.trian  # noqa: B018
    assert (Path(minisft.__file__).parent / "py.typed").is_file()


def test_no_module_bears_the_name_of_a_function():
    assert not {path.stem for path in Path(minisft.__file__).parent.iterdir()} & set(FUNCTIONS)


def test_a_python_that_is_too_old_is_named():
    """The code before the check has no newer syntax, so that this is what an old interpreter says too."""
    code = "import sys; sys.version_info = (3, 8, 18); {}; import minisft"
    words = [sys.executable, "-c"]
    imported = subprocess.run([*words, code.format("pass")], capture_output=True, text=True)
    assert "ImportError: Python 3.8 is too old\n  Fix: use Python 3.10 or newer" in imported.stderr
    as_command = subprocess.run([*words, code.format("sys.argv = ['-m']")], capture_output=True, text=True)
    assert as_command.returncode == 2
    assert as_command.stderr == "minisft: Python 3.8 is too old\n  Fix: use Python 3.10 or newer\n"


def test_importing_the_package_loads_no_library_and_takes_little_time():
    heavy = {"torch", "pydantic", "rich", "numpy", "datasets", "transformers", "yaml"}
    found = subprocess.run(
        [sys.executable, "-c", "import minisft, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not heavy & set(found.stdout.split())

    def median(code):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    assert median("import minisft") <= 5 * median("pass")


# --- recipes and overrides --------------------------------------------------------------------------------


def test_an_override_of_python_equals_the_word_of_the_command_line(recipe_file):
    words = load_recipe(recipe_file, ["training.epochs=3", "training.lora={rank: 4}", "data.limit=null", "seed=7"])
    values = [("training.epochs", 3), ("training.lora", {"rank": 4}), ("data.limit", None), ("seed", 7)]
    assert load_recipe(recipe_file, values) == words
    assert make_recipe(values, load_recipe(recipe_file)) == words


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"training.epoch": 3}, "did you mean 'training.epochs'"),
        ({"training.epochs": "many"}, "training.epochs: 'many' does not fit"),
        ({"training.processes": 1.5}, "training.processes: 1.5 does not fit"),
        ({"training.packing": 1}, "give true or false"),
        ({"training.learning_rate": float("nan")}, "does not fit"),
        ({"training.report_to": {1, 2}}, "a value of the type set fits no key"),
        ({"data.test": {1: "x"}}, "the key 1 is not text"),
        ({3: 4}, "is not an override"),
        ("training.epochs=3", "is not an override"),
    ],
)
def test_a_wrong_override_is_refused_and_named(recipe_file, overrides, problem):
    with pytest.raises(minisft.UserError, match=problem):
        minisft.prepare(recipe_file, overrides)


def test_an_override_that_holds_itself_is_refused(recipe_file):
    value: list = []
    value.append(value)
    with pytest.raises(minisft.UserError, match="levels deep"):
        minisft.prepare(recipe_file, {"data.source": value})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (dict(model="m"), "no recipe is given, nor `data`, `output`"),
        (dict(recipe="r.yaml", model="m"), "a recipe is given, and `model` too"),
        (dict(recipe=5), "a value of the type int is not a recipe"),
        (dict(recipe="absent.yaml"), "there is no such recipe"),
    ],
)
@pytest.mark.parametrize("function", [minisft.train, minisft.prepare, minisft.plan, minisft.check])
def test_arguments_that_name_no_recipe_are_refused(function, arguments, problem):
    with pytest.raises(minisft.UserError, match=problem):
        function(**arguments)


# --- rows in memory ---------------------------------------------------------------------------------------


def test_rows_in_memory_lie_in_one_file_named_by_their_content(cache):
    listed = source_of(rows())
    assert source_of(iter(rows())) == listed
    sorted_keys = [json.loads(json.dumps(row, sort_keys=True)) for row in rows()]  # datasets 4.0 sorts nested keys
    assert source_of(datasets.Dataset.from_list(sorted_keys)) == source_of(sorted_keys)
    assert source_of(rows(29)) != listed
    assert [json.loads(line) for line in Path(listed).read_text().splitlines()] == rows()
    assert len(list((cache / "rows").iterdir())) == 3
    assert source_of("a.jsonl") == "a.jsonl"
    assert source_of([Path("a.jsonl"), "b"]) == ["a.jsonl", "b"]


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ([], "data: there are no rows"),
        ([{"a": 1}, 5], r"data\[1\]: a row of the type int"),
        ([{"a": [0, float("nan")]}], r"data\[0\]\['a'\]\[1\]: nan"),
        ([{"a": b"x"}], r"data\[0\]\['a'\]: a value of the type bytes"),
        ([{"a": datetime.date(2024, 1, 1)}], r"data\[0\]\['a'\]: a value of the type date"),
        ([{1: 2}], r"data\[0\]: the key 1"),
        ([{"a": "\ud800"}], r"data\[0\]: .*surrogate"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(rows(2))),
            r"data: these are several splits \('train'\)",
        ),
        (7, "data: a value of the type int"),
    ],
)
def test_rows_that_json_cannot_hold_are_refused_by_number_and_key(cache, data, where):
    with pytest.raises(minisft.UserError, match=where):
        source_of(data)
    assert not list(cache.glob("rows/*"))


# --- the way through --------------------------------------------------------------------------------------


def test_rows_become_a_run_that_is_scored_and_answers(tmp_path, tiny_model, capsys):
    steps = []

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    data = minisft.prepare(model=tiny_model, data=rows(), output=tmp_path / "run", overrides=SETTINGS)
    row = data.train[0]
    assert row.text.endswith("yes</s>")
    assert len(row.ids) == len(row.labels)
    assert len(data.train) + len(data.test) == data.ledger["rows"]["kept"] == 30
    assert data.train[-1].id == data.train[len(data.train) - 1].id == list(data.train)[-1].id
    assert [one.id for one in data.train[:2]] == [data.train[0].id, data.train[1].id]
    messages = data.test[0].messages
    assert messages is not None
    assert messages[-1]["content"] == "yes"
    assert data.train[0].messages is None
    with pytest.raises(IndexError):
        data.train[1000]

    run = minisft.train(
        model=tiny_model, data=rows(), output=tmp_path / "run", overrides=SETTINGS, callbacks=[Counter()]
    )
    assert steps == [1, 2]
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert [path.name for path in run.checkpoints] == ["checkpoint-2"]
    assert run.model == tmp_path / "run" / "model"
    assert run.results is None
    assert minisft.load(run.folder) == run
    plain = run.evaluate()
    assert "custom" not in plain["base"]
    scores = run.evaluate(metrics={"words": lambda outputs, references, prompts: [len(p.split()) for p in prompts]})
    entry = scores["base"]["custom"]["words"]
    assert entry["low"] <= entry["score"] <= entry["high"]
    assert entry["reliable"] is False
    assert len(entry["values"]) == 3
    assert set(scores["constant"]["custom"]) == set(scores["checkpoints"][0]["custom"]) == {"words"}
    assert json.loads((run.folder / "evaluation" / "results.json").read_text()) == scores
    results = (run.folder / "evaluation" / "results.json").read_bytes()
    assert run.evaluate() == plain
    assert (run.folder / "evaluation" / "results.json").read_bytes() != results
    assert run.report() == run.folder / "report.html"
    assert isinstance(run.chat("Hi!", max_new_tokens=2), str)
    assert run.chat([{"role": "user", "content": "Hi!"}], max_new_tokens=2) == run.chat("Hi!", max_new_tokens=2)
    assert run.export(tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out" / "config.json").is_file()
    assert f"trained: {run.model}" in capsys.readouterr().out


def test_a_run_and_a_row_show_in_a_notebook_with_foreign_text_escaped(run_folder):
    run = minisft.load(run_folder)
    shown = run._repr_html_()
    assert shown.count("data:image/png;base64,") == 2
    assert "<table>" in shown
    assert "<script" not in shown
    row = run.data.train[0]
    assert row._repr_html_().count("<span") == len(row.ids)
    assert "train" in run.data._repr_html_()


def test_a_foreign_text_in_a_row_is_text(tmp_path, tiny_model):
    hostile = [
        {"messages": [{"role": "user", "content": "<script>"}, {"role": "assistant", "content": f"{n}<img src=x>"}]}
        for n in range(2)
    ]
    data = minisft.prepare(
        model=tiny_model, data=hostile, output=tmp_path / "run", overrides={**SETTINGS, "data.test_fraction": 0}
    )
    assert "<script" not in data.train[0]._repr_html_()
    assert "&lt;" in data.train[0]._repr_html_()


def _fails(outputs, references, prompts):
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ({"bleu": _fails}, "a score of this name"),
        ({"a b": _fails}, "not an identifier"),
        ({"m": 3}, "not a function"),
        ({"m": _fails}, r"metrics\['m'\] on constant: the metric failed \(ZeroDivisionError: by zero\)"),
        ({"m": lambda o, r, p: [1.0]}, "it returned 1 number for"),
        ({"m": lambda o, r, p: [float("inf")] * len(o)}, "it returned inf for answer 0"),
        ({"m": lambda o, r, p: ["x"] * len(o)}, "it returned 'x' for answer 0"),
        ({"m": lambda o, r, p: None}, "not a list"),
    ],
)
def test_a_metric_that_fails_is_named(run_folder, metrics, problem):
    with pytest.raises(minisft.UserError, match=problem) as caught:
        minisft.load(run_folder).evaluate(metrics=metrics)
    if "failed" in problem:
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("settings", [{"training.processes": 2}, {"training.strategy": "zero2"}])
def test_callbacks_for_other_processes_are_refused(recipe_file, settings):
    with pytest.raises(minisft.UserError, match="cannot be sent to the processes"):
        minisft.train(recipe_file, settings, callbacks=[TrainerCallback()])


@pytest.mark.parametrize(
    ("options", "where"),
    [(dict(temperature=-1), "temperature"), (dict(top_p=0), "top_p"), (dict(max_new_tokens=0), "max_new_tokens")],
)
def test_chat_names_an_argument_out_of_its_range(run_folder, options, where):
    with pytest.raises(minisft.UserError) as caught:
        minisft.load(run_folder).chat("Hi!", **options)
    assert caught.value.where == where


def test_a_conversation_that_ends_in_an_answer_is_refused(run_folder):
    with pytest.raises(minisft.UserError, match="does not end with a user's message"):
        minisft.load(run_folder).chat([{"role": "assistant", "content": "x"}])


def test_a_run_is_prepared_from_another_thread_and_a_second_time(recipe_file):
    found = []
    thread = threading.Thread(target=lambda: found.append(len(minisft.prepare(recipe_file).train)))
    thread.start()
    thread.join()
    assert found == [len(minisft.prepare(recipe_file).train)]


def test_check_returns_its_results(recipe_file):
    results = minisft.check(recipe_file, quick=True)
    assert len(results) == len({result.name for result in results}) > 10
    assert "FAILED" not in {result.status for result in results}
    assert (Path(minisft.prepare(recipe_file).folder) / "check.json").is_file()


def test_loading_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(minisft.UserError, match="not a run folder"):
        minisft.load(tmp_path)


PAUSES = """
import gc
from minisft.runner import importing
with importing():
    print(gc.isenabled())
    import torch
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
before = gc.get_freeze_count()
with importing():
    print(gc.isenabled())
print(gc.get_freeze_count() == before)
"""


def test_the_garbage_collector_pauses_for_the_first_imports_only():
    """Frozen garbage is never collected, so a second call must not freeze what the caller has dropped."""
    done = subprocess.run([sys.executable, "-c", PAUSES], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True", "True"]
