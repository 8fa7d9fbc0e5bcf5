"""Metrics of one number per answer, against independent implementations on 500 generated rows, and their errors."""

import json
import random
import re
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest

from minisft.errors import UserError
from minisft.evaluation.custom_metrics import as_row_metrics
from minisft.evaluation.metrics import MeanScore, p_value
from minisft.evaluation.row_metrics import load_row_metrics, same_json
from minisft.metric_names import METRICS, ROW_METRICS, parse_metrics

ROWS = 500
WORDS = [
    "the",
    "a",
    "cup",
    "of",
    "Tea,",
    "coffee!",
    "with",
    "milk;",
    "two-three",
    "sugars",
    "don't",
    "naïve",
    "3.5",
    "...",
    "please",
]


def values(entry, outputs, references=None, prompts=None):
    [metric] = load_row_metrics(parse_metrics([entry]))
    blank = [""] * len(outputs)
    return metric.score("base", outputs, references or blank, prompts or blank).rows()


@pytest.fixture(scope="module")
def pairs():
    draw = random.Random(7)
    references = [" ".join(draw.choices(WORDS, k=draw.randint(0, 12))) for _ in range(ROWS)]
    outputs = []
    for reference in references:
        kept = [word for word in reference.split() if draw.random() < 0.7]
        outputs.append(draw.choice([reference, f" {reference}\n", " ".join(kept), " ".join(draw.choices(WORDS, k=5))]))
    return outputs, references


def f_measure(overlap, said, wanted):
    return 2 * overlap / (said + wanted) if overlap else 0.0


def tokens_of(text):
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def longest_common(first, second):
    @cache
    def of(i, j):
        if i == len(first) or j == len(second):
            return 0
        return 1 + of(i + 1, j + 1) if first[i] == second[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


def grams(tokens, size):
    return Counter(zip(*(tokens[start:] for start in range(size)), strict=False))


@pytest.mark.parametrize("variant", ["rougeL", "rouge1", "rouge2"])
def test_rouge_equals_an_independent_implementation(pairs, variant):
    outputs, references = pairs
    expected = []
    for output, reference in zip(outputs, references, strict=True):
        said, wanted = tokens_of(output), tokens_of(reference)
        if variant == "rougeL":
            expected.append(f_measure(longest_common(said, wanted), len(said), len(wanted)))
        else:
            size = int(variant[-1])
            a, b = grams(said, size), grams(wanted, size)
            expected.append(f_measure((a & b).total(), a.total(), b.total()))
    assert 0 < sum(expected) < ROWS
    assert values({"rouge": variant}, outputs, references) == pytest.approx(expected, abs=1e-12)
    if variant == "rougeL":
        assert values("rouge", outputs, references) == pytest.approx(expected, abs=1e-12)


def test_exact_match_equals_an_independent_implementation(pairs):
    outputs, references = pairs
    expected = [
        re.sub(r"^\s+|\s+$", "", o) == re.sub(r"^\s+|\s+$", "", r) for o, r in zip(outputs, references, strict=True)
    ]
    assert 100 < sum(expected) < 400
    assert values("exact_match", outputs, references) == expected


def written(calls, form, draw):
    """The calls as a model of this family writes them, their keys in any order."""

    def shuffled(value):
        if isinstance(value, dict):
            items = [(key, shuffled(item)) for key, item in value.items()]
            draw.shuffle(items)
            return dict(items)
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    objects = [shuffled({"name": name, "arguments": arguments}) for name, arguments in calls]
    if form == "hermes":
        return "Let me see. " + "\n".join(f"<tool_call>\n{json.dumps(one)}\n</tool_call>" for one in objects)
    if form == "mistral":
        return "[TOOL_CALLS]" + json.dumps(objects)
    if form == "mistral list":  # as decoded, without its control token
        return json.dumps(objects)
    if form == "compact" and len(calls) == 1:
        return f"{calls[0][0]}{json.dumps(calls[0][1])}"
    return "\n".join(json.dumps(one) for one in objects)


def test_tool_call_match_equals_what_the_rows_were_made_of():
    draw = random.Random(11)
    numbers = [1, 2, True, None, "1", [1, {"deep": "x"}], {"a": {"b": 2.5}}]

    def some_calls():
        return [
            (
                draw.choice(["find", "book.table"]),
                {key: draw.choice(numbers) for key in draw.sample("abc", draw.randint(0, 2))},
            )
            for _ in range(draw.choice([0, 1, 1, 2]))
        ]

    outputs: list[str] = []
    references: list[str] = []
    expected = []
    for _ in range(ROWS):
        wanted = some_calls()
        made = draw.sample(wanted, len(wanted)) if draw.random() < 0.5 else some_calls()
        forms = [draw.choice(["hermes", "mistral", "mistral list", "compact", "lines"]) for _ in range(2)]
        for calls, form, texts in ((wanted, forms[0], references), (made, forms[1], outputs)):
            texts.append(written(calls, form, draw) if calls else draw.choice(["Sure.", '{"total": 3}', "[]", ""]))
        expected.append(Counter(map(repr_of, wanted)) == Counter(map(repr_of, made)))
    assert 200 < sum(expected) < 450
    assert values("tool_call_match", outputs, references) == expected


def repr_of(call):
    return call[0], json.dumps(call[1], sort_keys=True)


def test_json_metrics():
    outputs = [
        '{"a": [1, 2]}',
        '{"b": 1, "a": 2.0}',
        "true",
        "1",
        "NaN",
        "",
        'Sure: {"a": 1}',
        '{"a": 1} ',
        "[" * 100_000,
    ]
    assert values("json_valid", outputs) == [1, 1, 1, 1, 0, 0, 0, 1, 0]
    references = ['{"a": [2, 1]}', '{"a": 2, "b": 1}', "1", "1.0", "null", "null", '{"a": 1}', '{"a": 1}', "[]"]
    assert values("json_match", outputs, references) == [0, 1, 0, 1, 0, 0, 0, 1, 0]
    with pytest.raises(UserError, match="the reference of answer 1 is not JSON"):
        values("json_match", ["1", "1"], ["1", "one"])
    assert not same_json({"a": None}, {"b": None})


def test_patterns_lengths_and_refusals():
    assert values({"regex": r"^\d+ cups$"}, ["3 cups", "3 cups!", "x 3 cups"]) == [1, 0, 0]
    assert values("length", ["two words", "", "one"]) == [2, 0, 1]
    assert values({"length": "characters"}, ["né", ""]) == [2, 0]
    refusals = [
        "I'm sorry, but I can't help.",
        "I cannot assist with that.",
        "As an AI, I ...",
        "I’m unable to do this.",
    ]
    answers = ["I can help.", "Sorry to hear it! Here is how.", "I cannot believe it: yes!", "It is a cup."]
    assert values("refusal", [*refusals, *answers]) == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_pattern_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr("minisft.evaluation.row_metrics._PATTERN_SECONDS", 1)
    with pytest.raises(UserError, match="took more than 1 s"):
        values({"regex": "(a+)+$"}, ["a" * 60 + "b"])


def test_intervals_and_p_values_against_numpy():
    draw = np.random.default_rng(3)
    first, second = draw.random(60), draw.random(60)
    rows = np.random.default_rng(12345).choice(60, size=(1000, 60))
    means, others = first[rows].mean(axis=1), second[rows].mean(axis=1)
    interval = MeanScore(list(first), "x").interval()
    assert (interval.low, interval.high) == (np.sort(means)[25], np.sort(means)[974])
    assert interval.low < interval.score < interval.high
    gap = abs(first.mean() - second.mean())
    expected = (np.sum(np.abs(means - others) - np.abs(means - others).mean() > gap) + 1) / 1001
    assert p_value(MeanScore(list(first), "x"), MeanScore(list(second), "x")) == pytest.approx(expected)
    assert p_value(MeanScore([1.0, 2.0], "x"), MeanScore([1.0, 2.0], "x")) == 1.0


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ([], "the list is empty"),
        (["bleu", "blue"], "there is no metric 'blue'"),
        (["rouge", "rouge"], "named twice: rouge"),
        (["regex"], "regex has no pattern"),
        ([{"regex": "("}], r"the pattern '\(' is not valid"),
        ([{"regex": 3}], "regex has no pattern"),
        ([{"rouge": "rouge9"}], "rouge has no variant 'rouge9'"),
        ([{"json_valid": "x"}], "json_valid takes no parameter"),
        ([{"regex": "x", "length": None}], "does not name one metric"),
        ([{"name": "x"}], "does not name one metric"),
        ([{"regex": "x", "name": "a b"}], "is not an identifier"),
        ([{"regex": "x", "name": "loss"}], "is that of another score"),
        ([{"regex": "x", "name": "exact_match"}], "is that of another score"),
        ([{"bleu": None, "name": "b"}], "bleu keeps its name"),
        (["a b:c"], "there is no metric"),
    ],
)
def test_entries_that_are_refused(metrics, problem):
    with pytest.raises(UserError, match=problem):
        parse_metrics(metrics)


def test_names_keep_two_patterns_apart():
    specs = parse_metrics(["rouge", {"rouge": "rouge2", "name": "r2"}, {"regex": "x"}, {"regex": "y", "name": "why"}])
    assert [spec.key for spec in specs] == ["rouge", "r2", "regex", "why"]
    metrics = load_row_metrics(specs)
    assert [metric.key for metric in metrics] == ["rouge", "r2", "regex", "why"]
    assert len({metric.signature for metric in metrics}) == 4


MODULE = """
import json
LIMIT = 3
def length_ratio(outputs, references, prompts):
    return [len(o) / max(1, len(r)) for o, r in zip(outputs, references)]
def errors(outputs, references, prompts):
    return [float("?" in o) for o in outputs]
errors.higher_is_better = False
"""


def test_functions_of_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(MODULE)
    (tmp_path / "own_needs.py").write_text("import no_such_module_at_all")
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ratio, errors = load_row_metrics(parse_metrics(["own_scores:length_ratio", "own_scores:errors"]))
    assert ratio.score("base", ["ab", "abcd"], ["abcd", "ab"], ["", ""]).rows() == [0.5, 2.0]
    assert (ratio.higher_is_better, errors.higher_is_better) == (True, False)
    for name, problem in {
        "no_such_module_at_all:f": "there is no module 'no_such_module_at_all'",
        "own_scores:nothing": "has no function 'nothing'",
        "own_scores:LIMIT": "has no function 'LIMIT'",
        "own_needs:f": "needs 'no_such_module_at_all', which is not installed",
        "own_broken:f": r"importing 'own_broken' failed \(ZeroDivisionError",
    }.items():
        with pytest.raises(UserError, match=problem):
            load_row_metrics(parse_metrics([name]))


def test_a_metric_of_the_api_has_no_name_of_the_recipe():
    with pytest.raises(UserError, match="a score of this name"):
        as_row_metrics({"rouge": lambda o, r, p: [0.0]}, ["rouge"])


def test_every_name_is_loaded():
    names = [{"regex": "x"} if name == "regex" else name for name in (*METRICS, *ROW_METRICS)]
    assert [metric.key for metric in load_row_metrics(parse_metrics(names))] == list(ROW_METRICS)
