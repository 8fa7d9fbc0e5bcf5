"""The PNG curves of a run folder."""

import json
import subprocess
import sys

import pytest

from minisft.errors import UserError
from minisft.report.plots import _score_panels, draw_curves
from minisft.report.run_data import read_run

SCORE = {"score": 12.0, "low": 9.0, "high": 14.5, "signature": "s"}


def entry(step, **fields):
    return {"step": step, "loss": 2.0 - step / 100, "bleu": SCORE, "chrf": SCORE, **fields}


def a_run(folder):
    (folder / "evaluation").mkdir()
    (folder / "recipe.yaml").write_text("model: tiny\n")
    steps = [{"step": n, "epoch": n / 10, "loss": 3 / (n + 1)} for n in range(20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps) + '{"step": 21, "lo')
    results = {
        "base": entry(0), "best": "checkpoint-20", "constant": {"text": "no", "bleu": SCORE, "chrf": SCORE},
        "checkpoints": [entry(10, checkpoint="checkpoint-10", loss=None), entry(20, checkpoint="checkpoint-20")],
    }  # fmt: skip
    (folder / "evaluation/results.json").write_text(json.dumps(results))
    return folder


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_loss_and_scores_are_drawn(tmp_path):
    drawn = draw_curves(a_run(tmp_path))
    assert drawn == [tmp_path / "evaluation/loss.png", tmp_path / "evaluation/scores.png"]
    assert all(is_png(path) for path in drawn)


def test_each_metric_has_a_panel_with_its_own_scale(tmp_path):
    path = a_run(tmp_path) / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    for number, one in enumerate([results["base"], *results["checkpoints"], results["constant"]]):
        one["refusal"] = {"score": number / 10, "low": 0.0, "high": 0.4}
        one["margin"] = {"score": -number, "low": -5.0, "high": 0.0}
    path.write_text(json.dumps(results | {"lower_is_better": ["refusal"], "no_direction": ["margin"]}))
    panels = [axes for axes in _score_panels(read_run(tmp_path)).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        "BLEU", "chrF", "refusal (lower is better)", "margin (neither is better)",
    ]  # fmt: skip
    line, *_ = panels[2].containers[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 10, 20], pytest.approx([0.0, 0.1, 0.2]))
    assert panels[2].get_ylim()[0] == 0
    assert panels[3].get_ylim()[0] < -4, "a score below zero is not cut off"


def test_a_run_without_results_has_its_training_loss(tmp_path):
    a_run(tmp_path)
    (tmp_path / "evaluation/results.json").unlink()
    assert draw_curves(tmp_path) == [tmp_path / "evaluation/loss.png"]


def test_a_folder_that_is_not_a_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        draw_curves(tmp_path)


def test_the_report_imports_no_torch():
    code = "import sys, minisft.report.plots; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
