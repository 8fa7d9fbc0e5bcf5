"""A model as a judge: which of two models' answers is better, and how good each answer is.

Verdicts are kept in `<output>/evaluation/judge/verdicts.jsonl` by a hash of the question, and no question is asked
twice. A pair of answers is asked in both orders: a model wins if it is preferred in both, and all else is a tie.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from minisft.console import answer_progress, console, say, warn
from minisft.errors import UserError
from minisft.evaluation.examples import EvalExample
from minisft.evaluation.judge_client import WHERE, Asking
from minisft.evaluation.judge_questions import (
    grade_question,
    pair_question,
    parse_grade,
    parse_verdict,
    question_key,
)
from minisft.evaluation.resampling import percentile_interval, resampled_rows
from minisft.files import write_atomically
from minisft.recipe import JudgeRecipe
from minisft.results import MIN_CONVERSATIONS, judge_rows
from minisft.text import dump_json

_INVALID = "invalid"  # the verdict of a reply that holds none
_MOST_INVALID = 20  # replies without a verdict, and none with one: the judge is not able to judge
_KEPT_TEXT = 4000  # characters of a reply that are kept with its verdict
_Z = 1.959964  # 95 % of a normal distribution
_WIDE = 100  # characters; a narrower terminal leaves the following columns out
_NOT_IN_NARROW = ("p", "by order", "no verdict")
_LEADS = {"win": 1, "tie": 0, "loss": -1}


class VerdictCache:
    """The verdicts by question, in a file of JSON lines; damaged lines are left out, and asked again.

    Args:
        path: `<output>/evaluation/judge/verdicts.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._verdicts: dict[str, dict[str, Any]] = {}
        damaged = 0
        for text in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                line = json.loads(text)
                self._verdicts.setdefault(str(line["key"]), {**line, "verdict": str(line["verdict"])})
            except (ValueError, TypeError, KeyError):
                damaged += 1
        if damaged > 1:  # the last line may be incomplete, if the process that wrote it was killed
            warn(f"{path}: {damaged} lines are damaged; these verdicts are asked for again")
        lines = self._verdicts.values()
        write_atomically(path, "".join(dump_json(line) + "\n" for line in lines))

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def verdict(self, key: str) -> str | None:
        """Return "1", "2", "TIE", a grade or "invalid"; None if there is no verdict yet."""
        return self._verdicts[key]["verdict"] if key in self._verdicts else None

    def reply(self, key: str) -> str:
        return str(self._verdicts[key].get("reply", "")) if key in self._verdicts else ""

    def add(self, key: str, verdict: str, reply: str, finish: str) -> None:
        """Add a verdict to the file; the line is written at once, so that a killed process loses none."""
        line = {"key": key, "verdict": verdict, "finish": finish, "reply": reply[:_KEPT_TEXT]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(dump_json(line) + "\n")
        self._verdicts[key] = line


@dataclass(frozen=True)
class _Judged:
    """One comparison of two answers, or the grade of one.

    Args:
        model: The model whose answer it is.
        rival: The model that it is compared with; None: the answer is graded.
        place: Number of the example.
        keys: Keys of the questions: of both orders, or of the grade; none where both answers are the same text.
    """

    model: str
    rival: str | None
    place: int
    keys: tuple[str, ...]


def judge_answers(
    settings: JudgeRecipe, examples: Sequence[EvalExample], outputs: Mapping[str, Sequence[str]], folder: Path
) -> dict[str, Any]:
    """Have the answers of all models judged, as far as the server answers; write the verdicts into `folder`.

    Args:
        settings: The recipe's `evaluation.judge`.
        examples: What the models answered.
        outputs: The answers of each model, one per example: the base model first, then the checkpoints by their steps.
        folder: `<output>/evaluation/judge`.

    Returns:
        The key `judge` of results.json. Its `problem` says why some answers have no verdict, and is null otherwise.

    Raises:
        UserError: The openai client is not installed.
    """
    asking = Asking(settings)
    cache = VerdictCache(folder / "verdicts.jsonl")
    judged, questions = _list_questions(settings, examples, outputs)
    _ask_missing(asking, cache, judged, questions)
    _write_judged(folder / "judged.jsonl", judged, examples, cache)
    conversations = _conversations(examples)
    pairs = [
        _summarise_pair([one for one in judged if (one.model, one.rival) == (model, rival)], cache, conversations)
        for model, rival in _pairs(settings.pairwise, list(outputs))
    ]
    grades = [
        _summarise_grades([one for one in judged if (one.model, one.rival) == (model, None)], cache, conversations)
        for model in (outputs if settings.rubric else ())
    ]
    return {
        "base_url": settings.base_url,
        "model": settings.model,
        "rubric": settings.rubric,
        "requests": asking.requests,
        "unjudged": sum(key not in cache for key in questions),
        "problem": None if asking.problem is None else [asking.problem.problem, asking.problem.fix],
        "reliable": len(set(conversations)) >= MIN_CONVERSATIONS,
        "pairs": pairs,
        "grades": grades,
    }


def _list_questions(
    settings: JudgeRecipe, examples: Sequence[EvalExample], outputs: Mapping[str, Sequence[str]]
) -> tuple[list[_Judged], dict[str, str]]:
    """Return what is to be judged, and the questions by their keys; arguments as those of `judge_answers`.

    They are in the order of the examples, so that a budget that is spent leaves all models equally far.
    """
    questions: dict[str, str] = {}
    judged: list[_Judged] = []
    for place, example in enumerate(examples):
        for model, rival in _pairs(settings.pairwise, list(outputs)):
            answer, other = outputs[model][place], outputs[rival][place]
            asked = [
                pair_question(settings, example.messages, first, second, example.reference)
                for first, second in ([] if answer == other else [(answer, other), (other, answer)])
            ]
            judged.append(_Judged(model, rival, place, _note(settings, asked, questions)))
        for model in outputs if settings.rubric else ():
            text = grade_question(settings, example.messages, outputs[model][place], example.reference)
            judged.append(_Judged(model, None, place, _note(settings, [text], questions)))
    return judged, questions


def _ask_missing(asking: Asking, cache: VerdictCache, judged: Sequence[_Judged], questions: Mapping[str, str]) -> None:
    """Ask the questions that have no verdict yet; give up where the first replies hold none at all."""
    of_grades = {one.keys[0] for one in judged if one.rival is None}
    missing = {key: question for key, question in questions.items() if key not in cache}
    valid = invalid = 0
    with answer_progress("judge", len(missing), "questions") as advance:

        def take(key: str, reply: str, finish: str) -> str | None:
            nonlocal valid, invalid
            found = parse_grade(reply) if key in of_grades else parse_verdict(reply)
            cache.add(key, found or _INVALID, reply, finish)
            valid, invalid = valid + (found is not None), invalid + (found is None)
            advance(1)
            if invalid >= _MOST_INVALID and not valid:
                return f"{invalid} of {invalid} replies hold no verdict, such as {' '.join(reply.split())[:100]!r}"
            return None

        if missing:
            asking.ask(missing, take)


def require_all_judged(results: Mapping[str, Any]) -> None:
    """Check that every comparison and grade of an evaluation has a verdict.

    Raises:
        UserError: Some have none; all others, and all scores, are in results.json.
    """
    judge = results.get("judge") or {}
    if judge.get("unjudged"):
        problem, fix = judge["problem"]
        questions = f"{judge['unjudged']:,} question{'s have' if judge['unjudged'] > 1 else ' has'} no verdict"
        raise UserError(f"{WHERE}: {judge['base_url']}", f"{problem}; {questions}, and all else is scored", fix)


def print_judge(judge: Mapping[str, Any]) -> None:
    """Print the win rates and grades as tables."""
    say(f"Judged by {judge['model']} at {judge['base_url']} ({judge['requests']:,} requests):")
    for heads, rows in judge_rows(judge):
        shown = [n for n, head in enumerate(heads) if console.width >= _WIDE or head not in _NOT_IN_NARROW]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number in shown:
            table.add_column(heads[number], justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(row[number]) for number in shown))
        console.print(table)
    if invalid := sum(one["invalid"] for one in (*judge["pairs"], *judge["grades"])):
        say(f"Left out, since a reply holds no verdict: {invalid:,} comparisons or grades.")
    if not judge["reliable"]:
        say(f"Fewer than {MIN_CONVERSATIONS} conversations were judged: too few for an interval or a p-value.")


def _pairs(compared: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (model, rival) pairs to compare; the names are in the order of their steps, base first."""
    pairs = {
        "none": [],
        "base": [(name, names[0]) for name in names[1:]],
        "previous": [(name, rival) for before, name in pairwise(names)
                     for rival in dict.fromkeys((names[0], before))],
        "all": [(name, rival) for place, name in enumerate(names) for rival in names[:place]],
    }  # fmt: skip
    return pairs[compared]


def _note(settings: JudgeRecipe, asked: Sequence[str], questions: dict[str, str]) -> tuple[str, ...]:
    """Add questions by their keys, which are returned; a question that is asked twice has one key."""
    keys = tuple(question_key(settings, question) for question in asked)
    questions.update(zip(keys, asked, strict=True))
    return keys


def _conversations(examples: Sequence[EvalExample]) -> list[int]:
    """Return the number of each example's conversation, whose answers follow one another with rising turns."""
    numbers: list[int] = []
    for place, example in enumerate(examples):
        before = examples[place - 1] if place else None
        goes_on = before is not None and before.id == example.id and before.turn < example.turn
        numbers.append(numbers[-1] if goes_on else len(set(numbers)))
    return numbers


def _outcome(one: _Judged, cache: VerdictCache) -> str:
    """Return "win", "loss" or "tie" of a comparison; "invalid" or "unjudged" where it has no two verdicts."""
    if not one.keys:
        return "tie"
    verdicts = [cache.verdict(key) for key in one.keys]
    if None in verdicts:
        return "unjudged"
    if _INVALID in verdicts:
        return _INVALID
    if verdicts == ["1", "2"]:
        return "win"
    return "loss" if verdicts == ["2", "1"] else "tie"


def _summarise_pair(judged: Sequence[_Judged], cache: VerdictCache, conversations: Sequence[int]) -> dict[str, Any]:
    outcomes = [_outcome(one, cache) for one in judged]
    wins, losses, ties = (outcomes.count(name) for name in ("win", "loss", "tie"))
    # Answers of one conversation depend on each other: the interval and the test count conversations.
    leads: Counter[int] = Counter()
    for one, outcome in zip(judged, outcomes, strict=True):
        if outcome in _LEADS:
            leads[conversations[one.place]] += _LEADS[outcome]
    rate = (wins + ties / 2) / (wins + losses + ties) if leads else None
    low, high = wilson_interval(rate, len(leads)) if rate is not None else (None, None)
    reliable = len(leads) >= MIN_CONVERSATIONS
    verdicts = [[cache.verdict(key) for key in one.keys] for one in judged]
    return {
        "model": judged[0].model,
        "rival": judged[0].rival,
        "win_rate": rate,
        "low": low,
        "high": high,
        "p": sign_test(*(sum(sign * lead > 0 for lead in leads.values()) for sign in (1, -1))) if reliable else None,
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "identical": sum(not one.keys for one in judged),
        "order_decided": sum(both in (["1", "1"], ["2", "2"]) for both in verdicts),
        "invalid": outcomes.count(_INVALID),
        "unjudged": outcomes.count("unjudged"),
        "reliable": reliable,
    }


def _summarise_grades(judged: Sequence[_Judged], cache: VerdictCache, conversations: Sequence[int]) -> dict[str, Any]:
    verdicts = [cache.verdict(one.keys[0]) for one in judged]
    graded = [
        (int(verdict), conversations[one.place])
        for one, verdict in zip(judged, verdicts, strict=True)
        if verdict not in (None, _INVALID)
    ]
    low, high = _bootstrap(graded) if graded else (None, None)
    return {
        "model": judged[0].model,
        "score": sum(grade for grade, _ in graded) / len(graded) if graded else None,
        "low": low,
        "high": high,
        "graded": len(graded),
        "invalid": verdicts.count(_INVALID),
        "unjudged": verdicts.count(None),
        "reliable": len({conversation for _, conversation in graded}) >= MIN_CONVERSATIONS,
    }


def wilson_interval(rate: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a win rate over `count` independent comparisons.

    A tie counts as half a win, so the variance is at most that of a proportion, and the interval is not too narrow.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    shrunk = 1 + _Z**2 / count
    middle = (rate + _Z**2 / (2 * count)) / shrunk
    half = _Z / shrunk * math.sqrt(rate * (1 - rate) / count + _Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of an exact sign test; ties are left out, and without wins and losses it is 1."""
    count, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def _bootstrap(graded: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean grade; whole conversations are drawn, not single answers."""
    numbers = {conversation: place for place, conversation in enumerate(dict.fromkeys(c for _, c in graded))}
    places = [numbers[conversation] for _, conversation in graded]
    sums, counts = np.bincount(places, [grade for grade, _ in graded]), np.bincount(places)
    draws = resampled_rows(len(sums))
    return percentile_interval(sums[draws].sum(axis=1) / counts[draws].sum(axis=1))


def _write_judged(path: Path, judged: Sequence[_Judged], examples: Sequence[EvalExample], cache: VerdictCache) -> None:
    """Write a line for each comparison and grade, with the judge's replies."""
    lines = []
    for one in judged:
        example = examples[one.place]
        line: dict[str, Any] = {"id": example.id, "turn": example.turn, "model": one.model}
        if one.rival is None:
            line["grade"] = cache.verdict(one.keys[0])
        else:
            line |= {"rival": one.rival, "outcome": _outcome(one, cache)}
            line["verdicts"] = [cache.verdict(key) for key in one.keys]
        line["replies"] = [cache.reply(key) for key in one.keys]
        lines.append(dump_json(line) + "\n")
    write_atomically(path, "".join(lines))
