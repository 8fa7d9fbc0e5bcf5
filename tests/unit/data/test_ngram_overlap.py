"""Shared n-grams against a plain implementation with sets of tuples, and planted passages."""

import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.ngram_overlap import NGRAM, SHORTEST, find_overlaps


def words_of(text):
    return re.findall(r"[^\W_]+", text.lower())


def ngrams(text, length):
    words = words_of(text)
    return [tuple(words[n : n + length]) for n in range(len(words) - length + 1)]


def plain(item, texts, most_texts=None):
    """The first text that shares an n-gram with the item, and the share of its words in such n-grams."""
    length = max(SHORTEST, min(NGRAM, max((len(words_of(passage)) for passage in item), default=0)))
    held = [set(ngrams(text, length)) for text in texts]
    covered, total, first = 0, 0, []
    for passage in item:
        marks = [False] * len(words_of(passage))
        for place, gram in enumerate(ngrams(passage, length)):
            holders = [number for number, grams in enumerate(held) if gram in grams]
            if holders and (most_texts is None or len(holders) <= most_texts):
                first.append(holders[0])
                marks[place : place + length] = [True] * length
        covered, total = covered + sum(marks), total + len(marks)
    return min(first, default=None), covered / total if total else 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([None, 1, 2]))
def test_shared_passages_are_those_of_a_plain_implementation(seed, most_texts):
    choose = random.Random(seed)
    stream = [f"w{choose.randrange(60)}" for _ in range(400)]

    def piece():  # pieces of one stream share passages, and all have a few words of their own
        start, length = choose.randrange(380), choose.choice([0, 3, 8, 9, 12, 13, 14, 30])
        return f"New{choose.randrange(9)}: {', '.join(stream[start : start + length])}!"

    items = [[piece() for _ in range(choose.randrange(4))] for _ in range(6)]
    texts = [" ".join(piece() for _ in range(choose.randrange(5))) for _ in range(6)]
    found = find_overlaps(items, texts, most_texts)
    assert [(one.text, one.share) for one in found] == [plain(item, texts, most_texts) for item in items]


def test_case_and_punctuation_do_not_matter_and_a_passage_is_shown():
    passage = "the quick brown fox jumps over the lazy dog near the old mill"
    (found,) = find_overlaps([["Before. " + passage.upper()]], ["nothing", f"so, “{passage.replace(' ', '; ')}”!"])
    assert (found.text, found.passage) == (1, passage)
    assert found.share == 13 / 14


def test_an_ngram_does_not_reach_into_the_next_passage():
    words = [f"w{n}" for n in range(26)]
    texts = [" ".join(words)]
    assert find_overlaps([[" ".join(words[:12]), "x " * 13, " ".join(words[12:24])]], texts)[0].text is None


def test_short_items_are_not_judged():
    short, text = "one two three four five six seven", "zero one two three four five six seven eight"
    (found,) = find_overlaps([[short]], [text])
    assert found.is_too_short
    assert found.text is None
    (found,) = find_overlaps([[f"{short} eight"]], [text])
    assert (found.text, found.share) == (0, 1.0)
    assert [one.text for one in find_overlaps([[], [""]], [text])] == [None, None]
    assert find_overlaps([], [text]) == []


def test_a_phrase_that_many_texts_hold_does_not_count_where_it_is_common():
    phrase = " ".join(f"w{n}" for n in range(13))
    assert find_overlaps([[phrase]], [phrase] * 10, most_texts=10)[0].text == 0
    assert find_overlaps([[phrase]], [phrase] * 11, most_texts=10)[0].text is None
    assert find_overlaps([[phrase]], [f"{phrase} " * 20], most_texts=10)[0].text == 0  # often in one text
