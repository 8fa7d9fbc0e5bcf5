"""The PNG curves of a run folder."""

import json
import subprocess
import sys

import pytest

from minisft.errors import UserError
from minisft.report.plots import draw_curves

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
