"""What the demo shows at its end, of whatever results there are; and the benchmarks' own data."""

import importlib.util
import json
from pathlib import Path

import pytest

from minisft.demo import show_demo

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def a_demo(root, metrics, best="checkpoint-5"):
    scores = {metric: {"score": 10.0} for metric in metrics}
    checkpoints = [{"checkpoint": best, **scores}] if best else []
    results = {"base": scores, "checkpoints": checkpoints, "best": best, "constant": scores}
    for name in ("base", best) if best else ("base",):
        folder = root / "evaluation" / name
        folder.mkdir(parents=True)
        line = {"prompt": "[INST] hi [/INST]\u2028", "output": f"{name} says", "reference": "hello"}
        (folder / "outputs.jsonl").write_text((json.dumps(line) + "\n") * 5)
    (root / "evaluation/results.json").write_text(json.dumps(results))
    return root


@pytest.mark.parametrize("metrics", [["bleu"], ["chrf"], ["bleu", "chrf"]])
def test_the_scores_that_there_are_are_shown(tmp_path, capsys, metrics):
    show_demo(a_demo(tmp_path, metrics))
    out = capsys.readouterr().out
    for metric, name in (("bleu", "BLEU"), ("chrf", "chrF")):
        assert (f"{name} on held-out answers: base 10.0, tuned (checkpoint-5) 10.0" in out) == (metric in metrics)
    assert out.count("checkpoint-5 says") == out.count("base says") == 3
    assert "[INST] hi [/INST]" in out
    assert "minisft chat" in out


def test_without_a_best_checkpoint_the_base_models_answers_are_shown(tmp_path, capsys):
    show_demo(a_demo(tmp_path, ["bleu"], best=None))
    out = capsys.readouterr().out
    assert out.count("base says") == 3
    assert "tuned:" not in out
    assert "BLEU on held-out answers: base 10.0, constant baseline 10.0" in out
    assert "No checkpoint could be scored." in out


@pytest.mark.parametrize("name", ["evaluate", "gpu", "prepare", "train"])
def test_benchmarks_run_without_arguments(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as it is when one is run as a script
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert Path(benchmark.parse_arguments([]).source).is_file()
