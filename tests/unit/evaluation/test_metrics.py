"""Scores against sacrebleu itself: its command line, its API, and brute force for the constant answer."""

import json
import random
import subprocess
import sys
from typing import Any

import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from minisft.evaluation.metrics import CorpusScore, best_constant, exact_match, p_value

TEXT = "yes no coffee tea with milk and sugar please , . ! small large the a one two it's ready - [/INST]"
WORDS = TEXT.split()


def texts(rows, seed, longest=12):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(rows)]


@pytest.fixture(scope="module")
def corpus():
    references = texts(60, 1)
    draw = random.Random(2)
    outputs = [r if draw.random() < 0.4 else o for r, o in zip(references, texts(60, 3), strict=True)]
    outputs[5], outputs[6], outputs[7] = "", "two lines-\nof text\n\nand more ", "  leading blank ."
    return outputs, references


def test_scores_and_intervals_equal_sacrebleus_command_line(corpus, tmp_path):
    outputs, references = corpus
    for name, rows in (("out", outputs), ("ref", references)):
        lines = [" ".join(text.splitlines()) + "\n" for text in rows]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        "ref",
        "-i",
        "out",
        "-m",
        "bleu",
        "chrf",
        "--confidence",
        "-w",
        "6",
    ]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for metric, theirs in zip(("bleu", "chrf"), json.loads(printed), strict=True):
        ours = CorpusScore(metric, outputs, references).interval()
        assert ours.score == pytest.approx(theirs["score"], abs=1e-6)
        assert ours.mean == pytest.approx(theirs["confidence_mean"], abs=1e-5)
        assert ours.half == pytest.approx(theirs["confidence_var"], abs=1e-5)
        assert ours.signature == theirs["signature"]
        assert ours.low < ours.score < ours.high


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_p_value_equals_sacrebleus_paired_bootstrap(corpus, metric):
    outputs, references = corpus
    other = texts(60, 9)[:40] + references[40:]
    systems = [("base", other), ("tuned", [" ".join(text.splitlines()) for text in outputs])]
    names = {"BLEU": BLEU(), "chrF2": CHRF()}
    theirs: Any
    _, theirs = PairedTest(systems, names, [references], test_type="bs", n_samples=1000)()
    ours = p_value(CorpusScore(metric, outputs, references), CorpusScore(metric, other, references))
    key = next(key for key in theirs if key.lower().startswith(metric))
    assert ours == theirs[key][1].p_value


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_systems_that_never_differ_have_a_p_of_one(corpus, metric):
    outputs, references = corpus
    same = CorpusScore(metric, outputs, references)
    assert p_value(same, CorpusScore(metric, outputs, references)) == 1.0


def test_empty_outputs_score_zero():
    interval = CorpusScore("bleu", ["", "", ""], texts(3, 1)).interval()
    assert (interval.score, interval.low, interval.high) == (0, 0, 0)


def test_exact_match_ignores_blanks_at_the_ends():
    assert exact_match(["a b", " c\n", "d"], ["a b", "c", "D"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_constant_answer_equals_brute_force(seed):
    answers = texts(40, seed, longest=7) + texts(8, seed, longest=7) + ["", "no no no no no , no no"]
    bleu = BLEU()
    scores = {a: bleu.corpus_score([a] * len(answers), [answers]).score for a in answers}
    assert scores[best_constant(answers)] == pytest.approx(max(scores.values()), abs=1e-9)


def test_of_equal_constants_the_most_frequent_wins():
    assert best_constant(["b", "a", "a", "b", "b c"]) in ("a", "b")
    assert best_constant(["one line", "two  \nlines", "two lines", "one line", "one line"]) == "one line"
