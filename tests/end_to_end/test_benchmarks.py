"""`evaluation.benchmarks`: figures equal those of the harness's own model, and what cannot work is refused.

The tests with the harness run where lm-eval is installed; all others run everywhere.
"""

import json
import random
import sys

import pytest

from minisft.cli import main
from tests.command import refused, run
from tests.tiny import WORDS, write_recipe

CHOICE = """task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} "
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
CONTINUE = """task: local_continue
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Return two YAML files of tasks, with 30 local rows."""
    folder, choose = tmp_path_factory.mktemp("tasks"), random.Random(0)
    rows = [
        {"question": " ".join(choose.choices(WORDS, k=3)), "choices": choose.sample(WORDS, 3), "answer": n % 3}
        for n in range(30)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("continue", CONTINUE)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return [folder / "choice.yaml", folder / "continue.yaml"]


def benchmarks_of(folder):
    return json.loads((folder / "evaluation/results.json").read_text())["benchmarks"]


def own_figures(tasks, **model):
    """Return the figures of the harness's own model `hf`: {task: {metric: (score, stderr)}}."""
    import lm_eval

    manager = lm_eval.tasks.TaskManager(include_path=str(tasks[0].parent))
    names = ["local_choice", "local_continue"]
    arguments = {"dtype": "float32", **{name: str(value) for name, value in model.items()}}
    found = lm_eval.simple_evaluate("hf", arguments, names, task_manager=manager, batch_size=4, device="cpu")
    assert found is not None
    return {
        name: {
            key.partition(",")[0]: (value, found["results"][name][key.replace(",", "_stderr,")])
            for key, value in found["results"][name].items()
            if key.endswith(",none") and "_stderr" not in key
        }
        for name in names
    }


def close_to(figures):
    """Return figures of MiniSFT as `own_figures` returns the harness's, to compare within rounding."""
    return {
        task: {metric: pytest.approx((entry["score"], entry["stderr"]), rel=1e-5) for metric, entry in metrics.items()}
        for task, metrics in figures.items()
    }


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_the_figures_are_those_of_the_harness_itself(tmp_path, tiny_model, conversations, tasks, capsys, lora):
    pytest.importorskip("lm_eval")
    adapters = ", lora: {rank: 4}" if lora else ""
    settings = f"{{max_steps: 4, learning_rate: 5.0e-2, precision: fp32{adapters}}}"
    recipe = write_recipe(tmp_path, tiny_model, conversations, settings)
    assert main(["train", str(recipe)]) == 0
    words = f"evaluation.benchmarks=[{tasks[0]}, {tasks[1]}]"
    status, printed, said = run(capsys, "evaluate", recipe, words)
    assert status == 0, said
    assert "local_continue perplexity" in printed
    models = benchmarks_of(tmp_path / "run")["models"]
    checkpoint = tmp_path / "run/checkpoints/checkpoint-4"
    trained = {"pretrained": tiny_model, "peft": checkpoint} if lora else {"pretrained": checkpoint}
    assert own_figures(tasks, pretrained=tiny_model) == close_to(models["base"])
    assert own_figures(tasks, **trained) == close_to(models["checkpoint-4"])
    before, after = (models[name]["local_continue"]["perplexity"] for name in ("base", "checkpoint-4"))
    assert after["difference"] == after["score"] - before["score"] != 0
    # nothing is computed twice
    kept = (tmp_path / "run/evaluation/base/benchmarks.json").stat().st_mtime_ns
    assert run(capsys, "evaluate", recipe, words).status == 0
    assert (tmp_path / "run/evaluation/base/benchmarks.json").stat().st_mtime_ns == kept
    assert benchmarks_of(tmp_path / "run")["models"] == models


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "said"),
    [("arc_easy", "if its data must be downloaded, load it once on a machine with a connection"),
     ("arc_eazy", "lm-evaluation-harness has no task 'arc_eazy'"), ("none.yaml", "there is no file none.yaml")],
)  # fmt: skip
def test_tasks_that_cannot_be_loaded_are_refused(run_folder, tmp_path, capsys, task, said):
    pytest.importorskip("lm_eval")
    assert said in refused(capsys, "evaluate", run_folder, f"evaluation.benchmarks=[{task}]")


def test_without_the_harness_it_is_said_how_to_install_it(run_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(capsys, "evaluate", run_folder, "evaluation.benchmarks=[arc_easy]")
    assert "lm-evaluation-harness is not installed\n  Fix: pip install 'minisft[benchmarks]'" in said


@pytest.mark.parametrize("value", ["[a, a]", "['']", "a", "[3]"])
def test_a_list_that_cannot_work_is_refused(run_folder, capsys, value):
    assert "evaluation.benchmarks" in refused(capsys, "evaluate", run_folder, f"evaluation.benchmarks={value}")


def test_a_run_folder_cannot_name_files_of_tasks(run_folder, tasks, capsys):
    """Such a file can run code of its author."""
    recipe = run_folder / "recipe.yaml"
    text = recipe.read_text()
    assert "benchmarks: []" in text
    recipe.write_text(text.replace("benchmarks: []", f"benchmarks: [{tasks[0]}]"))
    said = refused(capsys, "evaluate", run_folder)
    assert "choice.yaml, a task file, which can run code" in said
    assert run(capsys, "evaluate", run_folder, "evaluation.benchmarks=[]").status == 0
