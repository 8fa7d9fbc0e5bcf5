"""Objectives by name, and their scores: kept in a file, compared by paired bootstrap, with a direction."""

import random

import numpy as np
import pytest

from minisft.errors import UserError
from minisft.evaluation.metrics import CorpusScore, MeanScore, p_value
from minisft.recipe import make_recipe
from minisft.search.halving import best_and_ties, decide
from minisft.search.objective import Objective, read_objective, read_scores, with_objective, write_score
from minisft.search.statistics import best_trial, clearly_worse, estimate, indistinguishable
from tests.tiny import WORDS

AGREES = {"regex": "^yes", "name": "agrees"}
FUNCTION = "tests.unit.search.test_objective:shortness"
METRICS = ["bleu", AGREES, "length", "refusal", FUNCTION]
BLEU = Objective("bleu", True, "bleu")


def shortness(outputs, references, prompts):
    return [-len(output) for output in outputs]


def penalty(outputs, references, prompts):
    return [0.0] * len(outputs)


penalty.higher_is_better = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def recipe():
    keys = [("model", "m"), ("output", "o"), ("data.source", "d.jsonl"), ("evaluation.metrics", METRICS)]
    return make_recipe(keys)


def corpus(right, seed=0, answers=60):
    """Return answers of which a share of `right` of the words is that of the references, and the references."""
    choose = random.Random(seed)
    references = [choose.choices(WORDS, k=12) for _ in range(answers)]
    errors = random.Random(f"{seed} {right}")
    outputs = [[word if errors.random() < right else "x" for word in words] for words in references]
    return [[" ".join(words) for words in texts] for texts in (outputs, references)]


def trial(folder, number, score, objective=BLEU):
    path = folder / f"{number}-{len(list(folder.iterdir()))}.npz"
    write_score(path, score, 1.5)
    return read_scores(path, number, objective)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("loss", Objective()),
        ("bleu", BLEU),
        ("chrf", Objective("chrf", True, "chrf")),
        ("agrees", Objective("agrees", True, AGREES)),
        ("refusal", Objective("refusal", False, "refusal")),
        (FUNCTION, Objective(FUNCTION, True, FUNCTION)),
        (f"{__name__}:penalty", Objective(f"{__name__}:penalty", False, f"{__name__}:penalty")),
    ],
)
def test_loss_metrics_entries_of_the_recipe_and_functions_are_objectives(recipe, name, found):
    assert read_objective(name, recipe) == found
    keys = with_objective(recipe, found).evaluation.metrics
    assert keys == [*METRICS, name] if name not in ("loss", "agrees", *map(str, METRICS)) else METRICS


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("blue", "there is no metric 'blue'"),
        ("length", "neither a higher nor a lower length is better"),
        ("regex", "regex has no pattern"),
        ("no.such:function", "no"),
    ],
)
def test_what_is_no_objective_is_refused(recipe, name, problem):
    with pytest.raises(UserError, match=problem):
        read_objective(name, recipe)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_a_corpus_score_that_was_kept_is_the_same(tmp_path, metric):
    score = CorpusScore(metric, *corpus(0.8))
    kept = trial(tmp_path, 4, score, Objective(metric, True, metric))
    assert (kept.trial, kept.value, len(kept)) == (4, score.score, 60)
    assert np.array_equal(kept.resamples, score.resamples)
    interval = estimate(kept)
    assert interval.low < interval.value < interval.high


def test_a_mean_that_was_kept_is_the_same(tmp_path):
    score = MeanScore([0.0, 1.0, 1.0, 0.5], "m")
    kept = trial(tmp_path, 1, score, Objective("refusal", False, "refusal"))
    assert (kept.value, len(kept), kept.higher_is_better) == (score.score, 4, False)


def test_the_highest_bleu_is_best_and_equal_ones_are_not_told_apart(tmp_path):
    scores = [CorpusScore("bleu", *corpus(right)) for right in (0.6, 0.9, 0.9001, 0.3)]
    trials = [trial(tmp_path, number, score) for number, score in enumerate(scores)]
    best = best_trial(trials)
    assert best in (1, 2)
    assert indistinguishable(trials) == [3 - best]
    assert clearly_worse(trials) == [0, 3]
    assert p_value(scores[1], scores[0]) < 0.01 < p_value(scores[1], scores[2])  # the test of `evaluate` agrees
    assert decide(8, 0, [trials], 0).going_on[0] == best


@pytest.mark.parametrize("higher", [True, False])
def test_the_direction_of_a_mean_decides_which_trial_is_best(tmp_path, higher):
    draw = np.random.default_rng(0)
    objective = Objective("own", higher, "own")
    scores = [MeanScore(list(draw.normal(mean, 0.1, 50)), "own") for mean in (0.2, 0.8)]
    trials = [trial(tmp_path, number, score, objective) for number, score in enumerate(scores)]
    assert best_trial(trials) == int(higher)
    assert clearly_worse(trials) == [1 - int(higher)]
    assert best_and_ties({one.trial: [one] * 4 for one in trials}, 0) == (int(higher), [])


def test_equal_corpora_are_rarely_told_apart(tmp_path):
    """0.05 and two standard errors of 40 sets of four models whose answers are as good as each other's."""
    wrong = 0
    for seed in range(40):
        scores = [CorpusScore("bleu", *corpus(0.7 + number * 1e-9, seed, answers=40)) for number in range(4)]
        trials = [trial(tmp_path, number, score) for number, score in enumerate(scores)]
        wrong += any(clearly_worse(trials, than=one.trial, level=0.05) for one in trials)
    assert wrong / 40 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 40)
