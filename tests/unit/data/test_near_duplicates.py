"""Near-duplicates by MinHash: planted ones are found, unrelated texts are not, against the exact similarity."""

import random
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.near_duplicates import SIMILAR, NearDuplicateFinder

VOCABULARY = [f"word{number}" for number in range(2000)]


def find(texts):
    finder = NearDuplicateFinder()
    for text in texts:
        finder.add(text)
    return finder.near_duplicates().tolist()


def text_of(choose, words):
    return " ".join(choose.choices(VOCABULARY, k=words))


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def similarity(one, other):
    left, right = shingles(one), shingles(other)
    return len(left & right) / len(left | right)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30))
def test_planted_near_duplicates_are_found_and_unrelated_texts_are_not(seed):
    choose = random.Random(seed)
    # One word of 120 changes three shingles: the similarity is 0.95, six standard errors of the estimate above 0.8.
    texts, planted = [text_of(choose, 120) for _ in range(80)], []
    for _ in range(20):
        words = choose.choice(texts[:80]).split()
        words[choose.randrange(len(words))] = "changed"
        planted.append(" ".join(words))
    assert min(max(similarity(text, other) for other in texts) for text in planted) > 0.94
    order = list(enumerate(texts + planted))
    tail = order[80:]
    choose.shuffle(tail)  # a near-duplicate comes after its original
    found = find([text for _, text in order[:80] + tail])
    assert not any(found[:80])
    assert all(found[80:])


def test_the_estimate_agrees_with_the_exact_similarity():
    choose = random.Random(0)
    base = [text_of(choose, 40) for _ in range(40)]
    texts = []
    for _ in range(1500):
        words = choose.choice(base).split()
        for _ in range(choose.randrange(5)):
            words[choose.randrange(len(words))] = choose.choice(VOCABULARY)
        texts.append(" ".join(words))
    exact = np.array([max((similarity(t, o) for o in texts[:i]), default=0.0) for i, t in enumerate(texts[:400])])
    found = np.array(find(texts))[:400]
    assert found[exact > SIMILAR + 0.1].all()
    assert found[exact > SIMILAR + 0.05].mean() > 0.9
    assert not found[exact < SIMILAR - 0.15].any()
    assert (exact > SIMILAR + 0.1).sum() > 50
    assert (exact < SIMILAR - 0.15).sum() > 50


def test_case_and_punctuation_do_not_matter():
    assert find(["One cup of tea, please!", "one cup of TEA please", "one cup of milk please"]) == [False, True, False]


def test_a_text_with_few_words_or_none():
    assert find(["Hi", "hi!", "Yes please", "", "?!", "?!", "..."]) == [False, True, False, False, False, True, False]


def test_a_script_without_spaces_is_compared_by_its_characters():
    chinese = "从前有座山山里有座庙庙里有个老和尚在给小和尚讲故事讲的是什么呢"
    other = "今天的天气很好我们一起去公园散步然后再去吃饭喝茶看电影怎么样"
    assert find([chinese, chinese.replace("呢", "啊"), other]) == [False, True, False]


def test_nothing_is_no_near_duplicate():
    assert find([]) == []


def test_blocks_of_texts_do_not_change_the_result(monkeypatch):
    choose = random.Random(1)
    texts = [text_of(choose, choose.randrange(1, 50)) for _ in range(60)]
    texts += [f"{text} more" for text in texts[:30]]
    expected = find(texts)
    monkeypatch.setattr("minisft.data.near_duplicates._BLOCK", 7)
    monkeypatch.setattr("minisft.data.near_duplicates._COMPARED", 2)
    assert find(texts) == expected
    assert any(expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 30))
def test_the_nearest_of_the_first_texts_is_the_original(seed):
    """Of 40 texts with 1 of 120 words changed, each finds its original; of 20 unrelated ones none finds any."""
    choose = random.Random(seed)
    originals = [text_of(choose, 120) for _ in range(60)]
    later, wanted = [], []
    for number in choose.sample(range(60), 40):
        words = originals[number].split()
        words[choose.randrange(120)] = "changed"
        later.append(" ".join(words))
        wanted.append(number)
    finder = NearDuplicateFinder()
    for text in (*originals, *later, *(text_of(choose, 120) for _ in range(20))):
        finder.add(text)
    nearest, estimated = finder.nearest(60)
    assert nearest.tolist() == wanted + [-1] * 20
    exact = [similarity(text, originals[number]) for text, number in zip(later, wanted, strict=True)]
    assert np.abs(estimated[:40] - exact).max() < 0.12  # six standard errors of 126 hashes at 0.95
    assert not estimated[40:].any()


def test_later_texts_are_not_compared_with_each_other():
    finder = NearDuplicateFinder()
    for text in ("one two three four", "five six seven eight", "five six seven eight"):
        finder.add(text)
    assert finder.nearest(1)[0].tolist() == [-1, -1]
    assert finder.nearest(2)[0].tolist() == [1]
    assert finder.nearest(3)[0].tolist() == []
    assert NearDuplicateFinder().nearest(0)[0].tolist() == []
