"""Comparisons of made-up run folders: figures, coincidence, the variant to take, and untrusted text that stays text."""

import json
import re
from typing import Any

import pytest

from minisft.errors import UserError
from minisft.report.comparison import Entry, differences, measure, relative_difference, write_comparison
from minisft.report.run_data import read_run
from tests.unit.report.test_page import Elements

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> [/INST] | &amp;"


def score(value):
    return {"score": value, "low": value - 1, "high": value + 1, "signature": "s", "p": {}}


def make_run(folder, seconds=1.0, memory=1000.0, sent=50.0, off=0.0, bleu=20.0, steps=10, off_from=1):
    (folder / "evaluation").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: tiny\n")
    lines = []
    for step in range(1, steps + 1):
        factor = 1 + (off if step >= off_from else 0)
        lines.append({
            "step": step, "loss": 4 / step * factor, "grad_norm": 2.0, "tokens": 90, "supervised_tokens": 30,
            "seconds": seconds * (9 if step == 1 else 1), "peak_memory_mb": memory, "communication_mb": sent,
        })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"step": 10, "loss": 1.5, "perplexity": 4.5, "exact_match": 0.0, "seconds": 1.0}
    entry |= {"bleu": score(bleu), "chrf": score(bleu + 5)}
    results = {
        "base": entry | {"step": 0}, "checkpoints": [entry | {"checkpoint": "checkpoint-10"}],
        "best": "checkpoint-10", "constant": {"text": "no", "bleu": score(1.0), "chrf": score(1.0)}, "failed": [],
    }  # fmt: skip
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    return folder


def entry(name, trajectory="one", **fields):
    return Entry(name, f"compare/{name}", (f"training.strategy={name}",), trajectory, **({"status": "done"} | fields))


def test_the_first_step_does_not_count_in_the_figures(tmp_path):
    figures = measure(read_run(make_run(tmp_path, seconds=2.0, memory=1234.0, sent=7.0)))
    assert figures["steps"] == 10
    assert figures["seconds_per_step"] == 2.0
    assert figures["supervised_tokens_per_second"] == pytest.approx(15.0)
    assert figures["training_seconds"] == pytest.approx(36.0)
    assert (figures["peak_memory_mb"], figures["communication_mb"]) == (1234.0, 7.0)
    assert figures["final_loss"] == pytest.approx(0.4)
    assert (figures["best"], figures["test_loss"]) == ("checkpoint-10", 1.5)
    assert figures["bleu"] == figures["scores"]["bleu"] == {"score": 20.0, "low": 19.0, "high": 21.0}


def test_a_run_without_metrics_has_no_figures(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: tiny\n")
    figures = measure(read_run(tmp_path))
    assert figures.pop("steps") == 0
    assert set(figures.values()) <= {None, 0}


def test_the_verdict_reports_that_curves_coincide_and_which_variant_to_use(tmp_path):
    make_run(tmp_path / "compare/vanilla", seconds=1.0, memory=4000.0, sent=500.0)
    make_run(tmp_path / "compare/zero1", seconds=1.5, memory=3500.0, sent=750.0, off=1e-6)
    make_run(tmp_path / "compare/zero3", seconds=3.0, memory=3000.0, sent=900.0, off=-1e-5)
    found = write_comparison(tmp_path, [entry("vanilla"), entry("zero1"), entry("zero3")])
    assert found["coincide"] is True
    assert found["take"] == ["vanilla"]
    assert found["verdict"] == [
        "The curves coincide within 2e-4: over 10 steps the losses of zero1 and zero3 differ from those of vanilla "
        "by at most 1e-5 of their size, the gradient norms by at most 0.",
        "Use vanilla here: no variant that ran is more than 3 % faster (1.00 s a step); zero1 takes 1.50 times, zero3 takes "
        "3.00 times as long.",
        "Where memory is short, zero3 needs 3.00 GB a process at its peak instead of 4.00 (25 % less), for 3.00 times "
        "the time of a step.",
        "MB that a process sends in a step: vanilla 500, zero1 750, zero3 900.",
    ]
    assert json.loads((tmp_path / "comparison.json").read_text()) == found
    assert (tmp_path / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "| vanilla | 1.00 | 30 | 4.00 | 500.0 | 0.4000 | 1.5000 |" in (tmp_path / "comparison.md").read_text()


def test_of_equally_fast_variants_the_one_with_least_memory_is_taken(tmp_path):
    make_run(tmp_path / "compare/vanilla", seconds=1.00, memory=4000.0)
    make_run(tmp_path / "compare/zero2", seconds=1.02, memory=3000.0)
    found = write_comparison(tmp_path, [entry("vanilla"), entry("zero2")])
    assert found["take"] == ["zero2"]
    assert any("also needs the least memory, 3.00 GB" in text for text in found["verdict"])


@pytest.mark.parametrize(("precision", "rounded"), [("bf16", True), ("fp32", False)])
def test_the_verdict_explains_why_curves_differ_in_half_precision(tmp_path, precision, rounded):
    for name, off in (("vanilla", 0.0), ("zero2", 3e-3)):
        run = make_run(tmp_path / "compare" / name, off=off)
        (run / "environment.json").write_text(json.dumps({"precision": precision}))
    found = write_comparison(tmp_path, [entry("vanilla"), entry("zero2")])
    assert found["coincide"] is False
    assert [variant["precision"] for variant in found["variants"]] == [precision] * 2
    assert ("In bf16 rounding alone parts them" in found["verdict"][0]) == rounded
    assert ("training.precision=fp32" in found["verdict"][0]) == rounded


def test_the_verdict_names_the_step_at_which_curves_part(tmp_path):
    make_run(tmp_path / "compare/vanilla")
    make_run(tmp_path / "compare/zero2", off=3e-3, off_from=7)
    found = write_comparison(tmp_path, [entry("vanilla"), entry("zero2")])
    assert found["coincide"] is False
    assert found["variants"][1]["against"]["parts_at"] == 7
    assert found["verdict"][0] == (
        "zero2 parts from vanilla at step 7: in 4 of 10 steps loss or gradient norm differ by more than 2e-4 of their "
        "size; the losses differ by at most 3e-3, the gradient norms by at most 0."
    )


def test_the_setting_with_the_best_score_is_taken(tmp_path):
    for name, bleu in (("low", 20.0), ("high", 25.0), ("middle", 24.0)):
        make_run(tmp_path / "compare" / name, bleu=bleu, off=bleu)
    found = write_comparison(tmp_path, [entry(name, name) for name in ("low", "high", "middle")])
    assert (found["take"], found["coincide"]) == (["high"], None)
    assert found["verdict"] == [
        "high scores best: BLEU 25.0 [24.0, 26.0], with checkpoint-10; next is middle with 24.0 [23.0, 25.0]: the "
        "intervals overlap, so it may be chance."
    ]


def test_every_metric_has_a_column_and_the_one_that_chose_the_checkpoints_decides(tmp_path):
    for name, refused in (("low", 0.5), ("lower", 0.25)):
        path = make_run(tmp_path / "compare" / name, bleu=100 * refused, off=refused) / "evaluation" / "results.json"
        results = json.loads(path.read_text())
        results["checkpoints"][0]["refusal"] = {"score": refused, "low": refused - 0.01, "high": refused + 0.01}
        results["checkpoints"][0]["precision"] = {"score": 0.75, "low": 0.5, "high": 1.0}  # a metric of one's own
        results |= {"best_by": {"metric": "refusal", "higher_is_better": False}, "lower_is_better": ["refusal"]}
        path.write_text(json.dumps(results))
    found = write_comparison(tmp_path, [entry(name, name) for name in ("low", "lower")])
    assert found["take"] == ["lower"]
    assert found["verdict"] == [
        "lower scores best: refusal 0.25 [0.24, 0.26], with checkpoint-10; next is low with 0.5 [0.49, 0.51]: the "
        "intervals do not overlap."
    ]
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    heads = next(line for line in lines if "s/step" in line)
    assert re.search(r"BLEU \| chrF \| refusal \| precision \|", heads)
    assert any("25.0 [24.0, 26.0] | 30.0 [29.0, 31.0] | 0.25 [0.24, 0.26] | 0.75 [0.5, 1] |" in line for line in lines)
    assert found["variants"][0]["precision"] is None, "of the arithmetic, not the metric"


def test_a_failed_variant_is_named_and_the_others_are_compared(tmp_path):
    make_run(tmp_path / "compare/vanilla")
    make_run(tmp_path / "compare/zero1", steps=3)
    make_run(tmp_path / "compare/zero2", seconds=2.0)
    failed = entry("zero1", status="failed", failed_at="train", error=f"killed\n{NASTY}")
    found = write_comparison(tmp_path, [entry("vanilla"), failed, entry("zero2"), entry("zero3", status="waiting")])
    assert found["take"] == ["vanilla"]
    assert "against" not in found["variants"][1]
    assert found["variants"][1]["steps"] == 3
    assert found["verdict"][-2:] == [f"zero1 failed (train): killed {NASTY}", "Not run yet: zero3."]
    elements = Elements((tmp_path / "comparison.html").read_text())
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert "img" not in [tag for tag, _ in elements.found]
    assert NASTY.replace("|", "\\|") not in (tmp_path / "comparison.md").read_text().split("\n\n")[2]


def test_figures_of_a_folder_with_another_run_are_not_shown(tmp_path):
    make_run(tmp_path / "compare/vanilla")
    found = write_comparison(tmp_path, [entry("vanilla", status="failed", failed_at="start", error="another's run")])
    assert "steps" not in found["variants"][0]
    assert not (tmp_path / "comparison.png").exists()
    assert "vanilla failed (start), the others continued:" in (tmp_path / "comparison.html").read_text()


def test_the_page_holds_every_section_and_loads_nothing(tmp_path):
    make_run(tmp_path / "compare/vanilla", steps=4000)
    make_run(tmp_path / "compare/zero2", steps=4000, off=1e-6)
    write_comparison(tmp_path, [entry("vanilla"), entry("zero2")])
    page = (tmp_path / "comparison.html").read_text()
    elements = Elements(page)
    ids = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    assert {"curves", "loss", "grad_norm", "spent", "figures", "variants"} <= ids
    assert not [a for _, a in elements.found if {"src", "href"} & set(a)]
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "coincide within 2e-4" in page
    data = json.loads(elements.data)
    assert data["names"] == ["vanilla", "zero2"]
    assert all(1000 < len(curve) <= 2000 for curves in data["curves"].values() for curve in curves)


def test_losses_that_are_not_finite_are_not_drawn(tmp_path):
    folder = make_run(tmp_path / "compare/vanilla")
    lines = (folder / "metrics.jsonl").read_text() + '{"step": 11, "loss": NaN, "grad_norm": Infinity, "seconds": 1, '
    (folder / "metrics.jsonl").write_text(lines + '"supervised_tokens": 1}\n')
    write_comparison(tmp_path, [entry("vanilla")])
    data = json.loads(Elements((tmp_path / "comparison.html").read_text()).data, parse_constant=pytest.fail)
    assert len(data["curves"]["loss"][0]) == 10


def test_differences_are_relative_and_cover_common_steps_only():
    reference = [{"step": n, "loss": 2.0, "grad_norm": 4.0} for n in (1, 2, 3)]
    ours: list[dict[str, Any]] = [
        {"step": 2, "loss": 2.0, "grad_norm": 4.4},
        {"step": 3, "loss": 1.0, "grad_norm": 4.0},
        {"step": 9, "loss": 7},
    ]
    found = differences(reference, ours)
    assert found == {"steps": 2, "loss": 0.5, "grad_norm": pytest.approx(0.1), "apart": 2, "parts_at": 2}
    assert relative_difference(None, None) == 0.0
    assert relative_difference(float("nan"), 1.0) == 1.0
    assert relative_difference(0.0, 0.0) == 0.0


def test_the_page_draws_every_variant_in_a_browser(started_browser, tmp_path):
    """The page draws a curve for each variant, shows its values, logs no error, and runs no script of untrusted text."""
    make_run(tmp_path / "compare/vanilla")
    make_run(tmp_path / "compare/zero2", seconds=2.0)
    entries = [entry("vanilla"), entry("zero2"), entry("bad", status="failed", failed_at="train", error=NASTY)]
    write_comparison(tmp_path, entries)
    browser = started_browser
    browser.open(tmp_path / "comparison.html")
    for figure in ("loss", "grad_norm"):
        assert browser.run(f"document.querySelectorAll('#{figure} path').length") == 2
    assert browser.text("pre") == NASTY
    shape = "document.querySelector('#loss path').getAttribute('d')"
    before = browser.run(shape)
    browser.click("#log")
    assert browser.run(shape) != before
    browser.hover("#loss svg", 0.97, 0.5)
    assert browser.text("#loss .tip") == "step 10\nvanilla: 0.4000\nzero2: 0.4000"
    browser.open(tmp_path / "comparison.html", width=390, dark=True)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.problems == []


def test_an_error_and_its_fix_are_two_sentences(tmp_path):
    error = str(UserError("disk", "the run needs 3 GB", "make room"))
    found = write_comparison(tmp_path, [entry("zero1", status="failed", failed_at="train", error=error)])
    assert found["verdict"] == ["zero1 failed (train): disk: the run needs 3 GB. Fix: make room"]
