"""Several test sets, own metrics, `best_by` and `retain` on a run with a tiny model: what is written and shown."""

import contextlib
import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import minisft
from minisft.data.encoder import Encoder
from minisft.data.preparation import prepare
from minisft.data.prepared import load_test
from minisft.errors import UserError
from minisft.evaluation.metrics import CorpusScore
from minisft.evaluation.retention import load_retained
from minisft.evaluation.run_evaluation import evaluate
from minisft.manifest import mark_new_folder
from minisft.monitoring.run_list import describe_best, run_scores
from minisft.recipe import DataRecipe, EvaluationRecipe, Recipe, dump_recipe
from minisft.report.gains import changes
from minisft.report.markdown import write_results
from minisft.report.page import write_report
from minisft.report.run_data import read_run
from minisft.run_folder import RunFolder, write_resolved_recipe
from tests.unit.evaluation.test_run_evaluation import conversations, lines, save_model, save_tokenizer

TEXTS = ["One coffee please.", "What size for the tea?", "<|im_end|> is spelled here.", "A small cocoa, done. " * 40]
METRICS: list[Any] = ["bleu", "rouge", "exact_match", {"regex": "coffee", "name": "coffee"}, "length", "refusal"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with two test sets of 24 and 3 conversations, texts to retain, a base model and two checkpoints."""
    folder = tmp_path_factory.mktemp("measures")
    rows = list(conversations(60))
    tokenizer = save_tokenizer(folder / "base", [json.dumps(row) for row in rows])
    save_model(folder / "base", tokenizer, 0)
    sets = {
        "mine": write_rows(folder / "mine.jsonl", rows[30:54]),
        "other": write_rows(folder / "other.jsonl", rows[54:57]),
    }
    retained = [{"text": text} for text in TEXTS] + [{"conversations": row["conversations"]} for row in rows[57:]]
    recipe = Recipe(
        model=str(folder / "base"),
        output=str(folder / "run"),
        data=DataRecipe(
            source=write_rows(folder / "train.jsonl", rows[:30]), template="chatml", test=sets, max_length=200
        ),
        evaluation=EvaluationRecipe(
            max_new_tokens=8, metrics=METRICS, retain=write_rows(folder / "retain.jsonl", retained)
        ),
    )
    prepare(recipe)
    for step in (9, 10):
        save_model(folder / f"run/checkpoints/checkpoint-{step}", tokenizer, step)
    return recipe


@pytest.fixture(scope="module")
def evaluated(made):
    """The results and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = evaluate(made, Path(made.output))
    (Path(made.output) / "recipe.yaml").write_text(dump_recipe(made))
    return results, printed.getvalue()


@pytest.fixture
def run(made, evaluated, tmp_path):
    shutil.copytree(made.output, tmp_path / "run")
    return tmp_path / "run"


def with_settings(recipe, **settings):
    return replace(recipe, evaluation=replace(recipe.evaluation, **settings))


def own_mean_loss(weights, rows):
    """Nats per token by transformers' own loss, row after row, and the number of tokens."""
    model = LlamaForCausalLM.from_pretrained(weights).eval()
    total, count = 0.0, 0
    for ids, labels in rows:
        wanted = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        total, count = total + loss * wanted, count + wanted
    return total / count, count


def test_the_ledger_and_the_data_name_the_sets(made):
    ledger = json.loads((Path(made.output) / "dataset/ledger.json").read_text())
    assert ledger["rows"]["test"] == 27
    assert ledger["test_sets"] == {"mine": 24, "other": 3}
    assert [row["test_set"] for row in load_test(made.output)] == ["mine"] * 24 + ["other"] * 3


def test_each_set_is_scored_alone_and_together(made, evaluated):
    results, _ = evaluated
    assert (results["answers"], results["conversations"]) == (24, 24)
    assert results["test_sets"] == {
        "mine": {"answers": 24, "conversations": 24},
        "other": {"answers": 3, "conversations": 3},
    }
    assert results["together"] == {"answers": 27, "conversations": 27}
    parts = {"mine": slice(0, 24), "other": slice(24, 27), "": slice(0, 27)}
    rows = load_test(made.output)
    for name in ("base", "checkpoint-9"):
        entry = results["base"] if name == "base" else results["checkpoints"][0]
        outputs = lines(Path(made.output) / "evaluation" / name / "outputs.jsonl")
        assert [line["test_set"] for line in outputs] == [row["test_set"] for row in rows]
        weights = made.model if name == "base" else Path(made.output) / "checkpoints" / name
        for set_name, part in parts.items():
            scored = entry["test_sets"][set_name] if set_name else entry["together"]
            expected = CorpusScore(
                "bleu", [o["output"] for o in outputs[part]], [o["reference"] for o in outputs[part]]
            )
            assert scored["bleu"]["score"] == pytest.approx(expected.score)
            for key in ("rouge", "exact_match", "coffee", "length", "refusal"):
                assert scored[key]["score"] == pytest.approx(np.mean([line[key] for line in outputs[part]]), abs=1e-4)
            loss, _ = own_mean_loss(weights, [(row["input_ids"], row["labels"]) for row in rows[part]])
            assert scored["loss"] == pytest.approx(loss, rel=1e-5)
        assert {key: entry[key] for key in ("bleu", "rouge", "loss", "finish")} == {
            key: entry["test_sets"]["mine"][key] for key in ("bleu", "rouge", "loss", "finish")
        }
        assert entry["test_sets"]["other"]["rouge"]["reliable"] is False
        assert "reliable" not in entry["rouge"]
        assert (
            set(entry["rouge"])
            == set(entry["bleu"])
            == {"score", "low", "high", "mean", "half_width", "signature", "p"}
        )
    assert results["checkpoints"][0]["rouge"]["p"].keys() >= {"base", "constant"}
    assert results["checkpoints"][0]["test_sets"]["other"]["rouge"]["p"]["base"] is None


def test_the_constant_baseline_is_scored_on_each_set(evaluated):
    constant = evaluated[0]["constant"]
    assert {"bleu", "rouge", "coffee"} <= set(constant) & set(constant["test_sets"]["other"]) & set(
        constant["together"]
    )


def test_a_limit_holds_for_each_set(made, run):
    results = evaluate(with_settings(made, limit=2), run)
    assert results["test_sets"] == {
        "mine": {"answers": 2, "conversations": 2},
        "other": {"answers": 2, "conversations": 2},
    }


def test_data_limit_holds_for_each_set_and_a_list_is_one_set(made, tmp_path):
    sets = made.data.test
    data = replace(
        made.data, test={"both": [sets["mine"], sets["other"]], "few": {"path": sets["other"], "limit": 1}}, limit=25
    )
    output = tmp_path / "run"
    prepared = prepare(replace(made, output=str(output), data=data))
    assert prepared.ledger["test_sets"] == {"both": 25, "few": 1}
    assert [row["test_set"] for row in load_test(output)] == ["both"] * 25 + ["few"]


def test_a_mapping_with_path_is_one_source(made, tmp_path):
    data = replace(made.data, test={"path": made.data.test["mine"], "limit": 4})
    prepared = prepare(replace(made, output=str(tmp_path / "run"), data=data))
    assert prepared.test_rows == 4
    assert "test_sets" not in prepared.ledger
    assert "test_set" not in load_test(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("test", "where", "problem"),
    [
        ({}, "data.test", "empty"),
        ({"a b": "x.jsonl"}, "data.test", "cannot be the name"),
        ({"limit": 3}, "data.test", "neither one source nor test sets"),
        ({"mine": []}, "data.test.mine", "the list of sources is empty"),
        ({"mine": 3}, "data.test.mine", "is not a source"),
        ({"mine": "no/such/file.jsonl"}, "no/such/file.jsonl", "no such file"),
    ],
)
def test_test_sets_that_are_refused(made, tmp_path, test, where, problem):
    with pytest.raises(UserError, match=problem) as caught:
        prepare(replace(made, output=str(tmp_path / "run"), data=replace(made.data, test=test)))
    assert caught.value.where == where


def test_a_set_without_a_usable_row_is_refused(made, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [{"conversations": [{"from": "gpt", "value": "x"}]}])
    data = replace(made.data, test={**made.data.test, "bad": path}, invalid="skip")
    with pytest.raises(UserError, match="no row of this test set can be used") as caught:
        prepare(replace(made, output=str(tmp_path / "run"), data=data))
    assert caught.value.where == "data.test.bad"


def test_a_training_file_in_a_test_set_is_refused(made, tmp_path):
    data = replace(made.data, test={"mine": made.data.source})
    with pytest.raises(UserError, match="is a training source too"):
        prepare(replace(made, output=str(tmp_path / "run"), data=data))


def test_retained_losses_equal_those_of_transformers(made, evaluated):
    results, _ = evaluated
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(made.model), "chatml")
    texts = load_retained(made.evaluation.retain, encoder, 200).texts
    assert [len(text.rows) > 1 for text in texts] == [False, False, False, True, False, False, False]
    for text, source in zip(texts, TEXTS, strict=False):
        whole = [token for ids, _ in text.rows for token in ids]
        assert encoder.tokenizer.decode(whole) == source
        assert not set(whole) & set(encoder.stop_token_ids)  # a spelled control token is text
    names = {"base": made.model, "checkpoint-9": Path(made.output) / "checkpoints/checkpoint-9"}
    losses = {name: [own_mean_loss(path, text.rows) for text in texts] for name, path in names.items()}
    sums = {name: np.array([loss * count for loss, count in found]) for name, found in losses.items()}
    counts = np.array([count for _, count in losses["base"]])
    draws = np.random.default_rng(12345).choice(7, size=(1000, 7))
    means = {name: found[draws].sum(axis=1) / counts[draws].sum(axis=1) for name, found in sums.items()}
    base, tuned = results["base"]["retain"], results["checkpoints"][0]["retain"]
    for entry, name in ((base, "base"), (tuned, "checkpoint-9")):
        assert entry["loss"] == pytest.approx(sums[name].sum() / counts.sum(), rel=1e-5)
        assert [entry["low"], entry["high"]] == pytest.approx(np.sort(means[name])[[25, 974]].tolist(), rel=1e-5)
        assert (entry["texts"], entry["tokens"], entry["reliable"]) == (7, counts.sum(), False)
    gap = np.sort(means["checkpoint-9"] - means["base"])[[25, 974]]
    assert tuned["difference"]["loss"] == pytest.approx(tuned["loss"] - base["loss"])
    assert [tuned["difference"]["low"], tuned["difference"]["high"]] == pytest.approx(gap.tolist(), abs=1e-5)
    assert "difference" not in base
    assert "retain" not in results["constant"]


def test_retained_losses_are_not_computed_twice(made, run, monkeypatch):
    monkeypatch.setattr("minisft.evaluation.backends.TransformersModel.__init__", None)  # loading a model would fail
    assert (
        evaluate(made, run)["base"]["retain"]
        == json.loads((run / "evaluation/results.json").read_text())["base"]["retain"]
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no rows"),
        ('{"text": ""}', "no token"),
        ('{"words": "x"}', "neither a conversation nor a text"),
        ("[1]", "neither a conversation nor a text"),
        ("{", "not JSON|JSON"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ends with the user"),
        (
            json.dumps({"messages": [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "y"}]}),
            "more than the",
        ),
    ],
)
def test_rows_of_retain_that_are_refused(made, run, tmp_path, text, problem):
    path = tmp_path / "retain.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=problem) as caught:
        evaluate(with_settings(made, retain=str(path)), run)
    assert "retain.jsonl" in caught.value.where


def test_a_missing_file_of_retain_is_refused(made, run):
    with pytest.raises(UserError, match=r"no/such\.jsonl is not a file"):
        evaluate(with_settings(made, retain="no/such.jsonl"), run)


def scores_of(results, key):
    return {
        entry["checkpoint"]: entry[key] if key == "loss" else entry[key]["score"] for entry in results["checkpoints"]
    }


def test_best_by_chooses_by_the_loss_or_a_metric_in_its_direction(made, run, tmp_path, monkeypatch):
    (tmp_path / "own_lower.py").write_text(
        "def longer(outputs, references, prompts):\n    return [float(len(o)) for o in outputs]\nlonger.higher_is_better = False\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    metrics = [*METRICS, "own_lower:longer"]
    chosen = {}
    for judge, pick in {"loss": min, "rouge": max, "coffee": max, "own_lower:longer": min}.items():
        results = evaluate(with_settings(made, metrics=metrics, best_by=judge), run)
        found = scores_of(results, judge)
        assert found[results["best"]] == pick(found.values())
        assert results["best_by"] == {"metric": judge, "higher_is_better": pick is max}
        scores = run_scores(RunFolder(run))
        assert (scores["metric"], scores["score"]) == (judge, pytest.approx(found[results["best"]]))
        assert judge in describe_best(scores)
        write_results(run)
        chosen[judge] = results["best"]
    assert len(set(chosen.values())) == 2


@pytest.mark.parametrize(
    ("best_by", "problem"),
    [("chrf", "evaluation.metrics has no 'chrf'"), ("length", "neither a higher nor a lower length is better")],
)
def test_a_best_by_that_is_refused(best_by, problem):
    with pytest.raises(UserError, match=problem):
        EvaluationRecipe(metrics=METRICS, best_by=best_by)


def test_without_bleu_the_first_metric_with_a_direction_decides(made, run):
    assert evaluate(with_settings(made, metrics=["length", "refusal", "rouge"]), run)["best_by"] == {
        "metric": "refusal", "higher_is_better": False,
    }  # fmt: skip
    assert evaluate(with_settings(made, metrics=["length"]), run)["best_by"]["metric"] == "loss"


def test_a_failing_metric_is_named_and_the_others_go_on(made, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_bad.py").write_text(
        "def short(outputs, references, prompts):\n    return [1.0]\n"
        "def nan(outputs, references, prompts):\n    return [float('nan')] * len(outputs)\n"
        "def late(outputs, references, prompts):\n"
        "    if len(set(outputs)) > 1:\n        raise KeyError('x')\n    return [1.0] * len(outputs)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = with_settings(made, metrics=["bleu", "own_bad:short", "own_bad:nan", "own_bad:late", "rouge"])
    with pytest.raises(UserError, match="own_bad:short on constant|returned 1 number") as caught:
        evaluate(recipe, run)
    assert "2 more failed" in caught.value.problem
    results = json.loads((run / "evaluation/results.json").read_text())
    assert [failure["metric"] for failure in results["failed_metrics"]] == [
        "own_bad:short",
        "own_bad:nan",
        "own_bad:late",
    ]
    assert "returned nan for answer 0" in results["failed_metrics"][1]["error"]
    assert "KeyError" in results["failed_metrics"][2]["error"]
    for entry in (results["base"], *results["checkpoints"], results["constant"]):
        assert {"bleu", "rouge"} <= set(entry)
        assert not any(key.startswith("own_bad") for key in entry)
    assert results["best"]
    assert "The other metrics go on" in capsys.readouterr().err
    assert "own_bad:nan could not be computed: it returned nan for answer 0" in write_report(run).read_text()
    assert "could not be computed: it returned nan for answer 0" in write_results(run).read_text()


def test_metrics_of_the_api_have_p_values_and_their_numbers(made, run):
    results = evaluate(made, run, custom_metrics={"words": lambda o, r, p: [len(text.split()) for text in p]})
    entry = results["checkpoints"][0]["custom"]["words"]
    assert len(entry["values"]) == 24
    assert entry["p"]["base"] == 1.0  # the prompts are the same
    assert len(results["checkpoints"][0]["together"]["custom"]["words"]["values"]) == 27
    write_report(run)


def test_the_table_shows_all_metrics_sets_and_retained_losses(evaluated):
    results, printed = evaluated
    for text in (
        "24 held-out replies of mine",
        "3 held-out replies of other",
        "27 held-out replies of all",
        "rouge",
        "coffee",
    ):
        assert text in printed
    assert "Loss on 7 texts of retain.jsonl" in printed
    assert f"{results['base']['retain']['loss']:.4f}" in printed


def test_the_page_and_the_markdown_show_them_too(run):
    page = write_report(run).read_text()
    for text in (
        'id="score-coffee"',
        ">rouge<",
        ">retained loss<",
        "Test set other: 3",
        "All test sets together: 27",
        ">Gained<",
        ">Lost<",
    ):
        assert text in page
    markdown = write_results(run).read_text()
    assert "rouge" in markdown
    assert "retained loss" in markdown


def test_gains_and_losses_follow_the_direction_of_each_metric(run):
    path = run / "evaluation/results.json"
    results = json.loads(path.read_text())
    best = next(entry for entry in results["checkpoints"] if entry["checkpoint"] == results["best"])

    def change(name, base, tuned):
        for entry, value in ((results["base"], base), (best, tuned)):
            for scored in (entry, entry["test_sets"]["mine"]):
                scored[name] = {**scored[name], "score": value, "p": {"base": 0.01}}

    change("refusal", 0.5, 0.1)
    change("rouge", 0.5, 0.1)
    change("length", 5.0, 9.0)
    best["retain"] |= {"difference": {"loss": 0.5, "low": 0.1, "high": 0.9}}
    path.write_text(json.dumps(results))
    found = {one.name: one for one in changes(read_run(run))}
    assert (found["refusal (mine)"].better, found["rouge (mine)"].better) == (True, False)
    assert found["rouge (mine)"].is_clear is True
    assert "length (mine)" not in found
    assert found["loss on retain.jsonl"].better is False
    assert found["loss on retain.jsonl"].is_clear is None  # of 7 texts
    assert not math.isnan(float(found["loss on retain.jsonl"].difference))


def test_a_run_folder_cannot_make_us_import_a_module(made, run, tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(
        "from pathlib import Path\nPath('imported').touch()\ndef f(outputs, references, prompts):\n    return [1.0] * len(outputs)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = with_settings(made, metrics=["bleu", "own_code:f"])
    mark_new_folder(run, "run")
    write_resolved_recipe(RunFolder(run), recipe)
    for given in (run, run / "recipe.yaml"):
        with pytest.raises(UserError, match="cannot consent to running code"):
            minisft.evaluate(given)
    assert not (tmp_path / "imported").exists()
    assert "own_code:f" in minisft.evaluate(run, {"evaluation.metrics": ["own_code:f"]})["base"]
    assert "own_code:f" in minisft.evaluate(run, trust_remote_code=True)["base"]
    assert minisft.evaluate(run, ["evaluation.metrics=[bleu]"])["best_by"]["metric"] == "bleu"


def test_rows_in_memory_are_test_sets_by_name(made, tmp_path):
    rows = list(conversations(8))
    data = minisft.prepare(
        model=made.model,
        data=rows[:4],
        test={"first": rows[4:7], "second": rows[7:]},
        output=tmp_path / "run",
        overrides={"data.template": "chatml"},
    )
    assert data.ledger["test_sets"] == {"first": 3, "second": 1}


@pytest.mark.long
def test_several_processes_give_the_same_retained_losses(made, evaluated, tmp_path):
    shutil.copytree(Path(made.output) / "dataset", tmp_path / "run/dataset")
    shutil.copytree(Path(made.output) / "checkpoints/checkpoint-9", tmp_path / "run/checkpoints/checkpoint-9")
    results = evaluate(with_settings(made, processes=2), tmp_path / "run")
    losses = [entry["retain"]["loss"] for entry in (results["base"], results["checkpoints"][0])]
    expected = [entry["retain"]["loss"] for entry in (evaluated[0]["base"], evaluated[0]["checkpoints"][0])]
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "damage",
    [
        {"test_sets": {"mine": {"conversations": "many"}}},
        {"test_sets": {"unknown": {"answers": 1, "conversations": 1}}},
        {"test_sets": 3},
        {"retain": {"file": "x"}},
        {"best_by": "bleu"},
    ],
)
def test_damaged_results_are_named(run, damage):
    path = run / "evaluation/results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(UserError, match="this file is damaged"):
        read_run(run)
