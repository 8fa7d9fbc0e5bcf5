"""What an evaluation claims: below 20 held-out conversations neither interval nor significance, anywhere it is told."""

import json
import re
from dataclasses import replace

import pytest

from minisft.evaluation.evaluator import Evaluator
from minisft.evaluation.metrics import CorpusScore
from minisft.metric_names import METRICS
from tests.command import run
from tests.tiny import write_conversations, write_recipe

# An interval as the texts write it, such as [1.0, 2.5], or as the verdict does.
INTERVAL = re.compile(r"\[\d+\.\d, \d+\.\d\]|95 % interval|interval \d|beyond chance|more than chance|p = \d|p: base")


def results_of(run):
    return json.loads((run / "evaluation/results.json").read_text())


def page_data(run):
    page = (run / "report.html").read_text()
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_few_rows_claim_no_interval_and_no_significance(run_folder, capsys):
    status, printed, _ = run(capsys, "evaluate", run_folder)
    assert status == 0
    assert "3 held-out conversations: fewer than 20 support neither" in printed
    assert not INTERVAL.search(printed)
    results = results_of(run_folder)
    assert (results["conversations"], results["reliable"]) == (3, False)
    for entry in (results["base"], results["constant"], *results["checkpoints"]):
        for metric in ("bleu", "chrf"):
            score = entry[metric]
            assert isinstance(score["low"], float)
            assert isinstance(score["high"], float)
            assert score["reliable"] is False
            assert set(score["p"].values()) == {None}
    status, printed, _ = run(capsys, "report", run_folder)
    assert status == 0
    for name in ("report.html", "results.md"):
        text = (run_folder / name).read_text().split("<script>")[0]
        assert not INTERVAL.search(text), name
        assert "3 held-out conversations: fewer than 20 support neither" in text
    points = page_data(run_folder)["scores"]["chrf"]["points"]
    assert [len(point) for point in points] == [2, 2, 2], "step and score, and no error bar"


def test_the_answers_of_one_conversation_count_once(run_folder, capsys):
    status, printed, _ = run(capsys, "evaluate", run_folder, "evaluation.turns=all")
    assert status == 0
    results = results_of(run_folder)
    assert results["answers"] > results["conversations"] == 3
    assert not INTERVAL.search(printed)


def test_twenty_conversations_are_enough(tmp_path, scored_run, tiny_model, capsys):
    talks = write_conversations(tmp_path / "talks.jsonl", 40)
    recipe = write_recipe(tmp_path, tiny_model, talks, "{max_steps: 1, precision: fp32}")
    held_out = write_conversations(tmp_path / "held-out.jsonl", 20, seed=9)
    for rows, reliable in ((20, True), (19, False)):
        output = tmp_path / f"run-{rows}"
        words = (f"output={output}", f"data.test={held_out}", f"evaluation.limit={rows}")
        assert run(capsys, "train", recipe, *words)[0] == 0
        status, printed, _ = run(capsys, "evaluate", output)
        assert status == 0
        assert bool(INTERVAL.search(printed)) is reliable
        assert run(capsys, "report", output)[0] == 0
        assert bool(INTERVAL.search((output / "results.md").read_text())) is reliable
        assert ("reliable" in results_of(output)) is not reliable
        [score] = [entry["chrf"] for entry in results_of(output)["checkpoints"]]
        assert isinstance(score["p"]["base"], float) is reliable
        lengths = {len(point) for point in page_data(output)["scores"]["chrf"]["points"]}
        assert lengths == ({4} if reliable else {2})


def test_results_of_an_earlier_version_claim_no_more_in_a_report(run_folder, capsys):
    results = results_of(run_folder)
    for key in ("conversations", "reliable"):
        results.pop(key, None)
    for entry in (results["base"], results["constant"], *results["checkpoints"]):
        for metric in ("bleu", "chrf"):
            entry[metric].pop("reliable", None)
            entry[metric]["p"] = {"base": 0.001, "constant": 0.001}
    (run_folder / "evaluation/results.json").write_text(json.dumps(results))
    assert run(capsys, "report", run_folder)[0] == 0
    assert not INTERVAL.search((run_folder / "results.md").read_text())


@pytest.fixture
def all_knowing_base(monkeypatch):
    """A base model that gives every reference: no checkpoint comes near it."""
    evaluate_model = Evaluator.evaluate_model

    def knows(self, name, weights):
        system = evaluate_model(self, name, weights)
        if name != "base":
            return system
        return replace(
            system,
            outputs=self.references,
            scores={metric: CorpusScore(metric, self.references, self.references) for metric in METRICS},
        )

    monkeypatch.setattr(Evaluator, "evaluate_model", knows)


def test_a_best_checkpoint_below_the_base_is_marked_in_table_and_report(run_folder, all_knowing_base, capsys):
    status, printed, _ = run(capsys, "evaluate", run_folder)
    assert status == 0
    assert "checkpoint-2 (best, but below base)" in " ".join(printed.split())
    assert run(capsys, "report", run_folder)[0] == 0
    assert "| **checkpoint-2 (best, but below base)** |" in (run_folder / "results.md").read_text()
    page = (run_folder / "report.html").read_text()
    assert "<td>checkpoint-2 (best, but below base)</td>" in page
    assert page_data(run_folder)["bestLabel"] == "best, but below base"


def test_the_demo_marks_a_best_checkpoint_below_the_base(run_folder, all_knowing_base, capsys):
    from minisft.demo import show_demo

    assert run(capsys, "evaluate", run_folder)[0] == 0
    show_demo(run_folder)
    assert "base 100.0, tuned (checkpoint-2, below base) 0.0" in capsys.readouterr().out


def test_a_comparison_of_few_conversations_is_marked_and_has_no_interval(run_folder, all_knowing_base, capsys):
    from minisft.report.comparison import Entry, write_comparison

    assert run(capsys, "evaluate", run_folder)[0] == 0
    entries = [Entry(name, run_folder.name, (), name, "done") for name in ("one", "two")]
    found = write_comparison(run_folder.parent, entries)
    assert "with checkpoint-2, which its base model beats" in found["verdict"][0]
    assert "fewer than 20 held-out conversations were scored" in found["verdict"][0]
    assert found["variants"][0]["bleu"]["reliable"] is False
    text = (run_folder.parent / "comparison.md").read_text()
    assert "below base" in text
    assert not INTERVAL.search(text)
    assert not INTERVAL.search((run_folder.parent / "comparison.html").read_text().split("<script>")[0])


def test_the_page_draws_no_error_bars_for_few_rows(started_browser, run_folder, all_knowing_base, capsys):
    assert run(capsys, "evaluate", run_folder)[0] == 0
    assert run(capsys, "report", run_folder)[0] == 0
    browser = started_browser
    browser.open(run_folder / "report.html")
    assert browser.run("document.querySelectorAll('#chrf circle.dot').length") == 3
    assert browser.run("document.querySelectorAll('#chrf line.c1:not(.dash)').length") == 0
    assert browser.run("document.querySelector('#chrf svg').getAttribute('aria-label')") == "chrF by step"
    browser.hover("#chrf svg", 0.97, 0.5)
    assert "[" not in browser.text("#chrf .tip")
    assert "checkpoint-2 (best, but below base)" in browser.text("#cards")
    assert browser.problems == []
