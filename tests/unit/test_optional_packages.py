"""A feature whose package is missing says so in one form, with the extra that brings the package."""

import re
import sys
from pathlib import Path

import pytest

from minisft.errors import UserError
from minisft.evaluation.benchmarks import require_harness
from minisft.evaluation.judge_client import require_client
from minisft.evaluation.row_metrics import load_row_metrics
from minisft.metric_names import parse_metrics
from minisft.optional_packages import PACKAGES, require_package

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("module", PACKAGES)
def test_the_extra_that_is_named_brings_the_package(module):
    found = re.fullmatch(r"minisft\[(\w+)\]", PACKAGES[module].requirement)
    if found is None:
        assert PACKAGES[module].requirement == "vllm"
        return
    brought = [re.split(r"[<>=;]", one)[0] for one in PROJECT["optional-dependencies"][found[1]]]
    assert {"lm_eval": "lm-eval", "rouge_score": "rouge-score"}.get(module, module) in brought


@pytest.mark.parametrize(
    ("module", "feature", "where"),
    [
        ("openai", require_client, "evaluation.judge"),
        ("lm_eval", require_harness, "evaluation.benchmarks"),
        ("rouge_score", lambda: load_row_metrics(parse_metrics(["rouge"])), "evaluation.metrics"),
    ],
)
def test_a_feature_without_its_package_names_the_extra(module, feature, where, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        feature()
    assert caught.value.where.startswith(where)
    assert caught.value.problem == f"{PACKAGES[module].title} is not installed"
    assert caught.value.fix.startswith(f"pip install '{PACKAGES[module].requirement}'")


def test_what_can_be_done_without_the_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError) as caught:
        require_package("evaluation.backend", "vllm", "leave it at transformers")
    assert caught.value.fix == "pip install vllm, or leave it at transformers"


def test_a_package_that_is_installed_is_not_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", sys)
    require_package("minisft search", "optuna")
