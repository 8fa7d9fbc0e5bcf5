"""The rules of `init`: each value at its boundaries, and what a rule promises for any data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.new_recipe.choices import (
    choose_batch,
    choose_epochs,
    choose_evaluation,
    choose_held_out,
    choose_learning_rate,
    choose_max_length,
    choose_max_new_tokens,
    count_text,
    percent,
    sizes_of_run,
)

lengths = st.lists(st.integers(2, 20_000), min_size=1, max_size=300).map(np.array)
contexts = st.one_of(st.none(), st.sampled_from([64, 512, 2048, 8192, 131072]))


# --- max_length -------------------------------------------------------------------------------------------


@given(lengths, contexts)
def test_max_length_cuts_at_most_1_percent_of_the_answers_unless_the_context_does(rows, context):
    ends = rows  # the last token of an answer is that of its row
    chosen = choose_max_length(rows, ends, context, "rows").value
    assert chosen % 64 == 0 or chosen == context
    assert context is None or chosen <= context
    if context is None or chosen < context:
        assert (ends > chosen).mean() <= 0.01
        assert chosen < rows.max() + 64


def test_max_length_takes_the_longest_row_or_leaves_an_outlier():
    rows = np.full(1000, 100)
    assert choose_max_length(rows, rows, None, "rows").value == 128
    rows[0] = 125  # a quarter longer
    assert choose_max_length(rows, rows, None, "rows").value == 128
    rows[0] = 5000
    found = choose_max_length(rows, rows, None, "rows")
    assert found.value == 128
    assert "0.1 % of the answers lie beyond" in found.reason
    assert "Alternative: 5056 cuts nothing" in found.reason


def test_max_length_is_limited_by_the_context():
    rows = np.full(10, 1000)
    found = choose_max_length(rows, rows, 500, "rows")
    assert found.value == 500
    assert "100.0 % of the answers lie beyond" in found.reason
    assert "Alternative" not in found.reason
    assert "No answer is cut" in choose_max_length(rows, rows, 1024, "rows").reason


# --- max_new_tokens ---------------------------------------------------------------------------------------


@given(lengths, st.data())
def test_max_new_tokens_cuts_at_most_1_percent_of_all_and_of_the_last_answers(answers, data):
    is_last = np.array(data.draw(st.lists(st.booleans(), min_size=len(answers), max_size=len(answers))))
    is_last[-1] = True
    chosen = choose_max_new_tokens(answers, is_last, None).value
    assert chosen % 16 == 0
    assert (answers > chosen).mean() <= 0.01
    assert (answers[is_last] > chosen).mean() <= 0.01


def test_max_new_tokens_leaves_half_of_the_context_to_the_prompt():
    answers, is_last = np.array([500]), np.array([True])
    assert choose_max_new_tokens(answers, is_last, 512).value == 256
    assert choose_max_new_tokens(answers, is_last, 1024).value == 512
    assert choose_max_new_tokens(np.array([16]), is_last, 512).value == 16
    assert choose_max_new_tokens(np.array([17]), is_last, 512).value == 32


# --- learning rate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "full", "lora"),
    [
        (260_032, 2e-4, 1e-3),  # smaller models than the smallest measured one take its rate
        (134_515_008, 2e-4, 1e-3),  # SmolLM2-135M, as recipes/taskmaster-smollm2.yaml
        (361_821_120, 9e-5, 9e-4),
        (1_711_376_384, 3e-5, 3e-4),
        (7_248_023_552, 8e-6, 8e-5),  # Mistral-7B, as recipes/mistral-7b-zero3.yaml
        (70_553_706_496, 1e-6, 1e-5),
    ],
)
def test_the_learning_rate_falls_with_the_size_and_is_ten_times_higher_for_adapters(parameters, full, lora):
    assert choose_learning_rate(parameters, False).value == pytest.approx(full)
    assert choose_learning_rate(parameters, True).value == pytest.approx(lora)
    assert "2e-4 was measured for SmolLM2-135M" in choose_learning_rate(parameters, False).reason


# --- epochs and batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(1, 8), (50, 8), (51, 8), (82, 5), (133, 4), (134, 3), (10_000, 3), (10_001, 2), (100_000, 2), (100_001, 1)],
)
def test_epochs_by_the_number_of_rows(rows, epochs):
    assert choose_epochs(rows).value == epochs


@pytest.mark.parametrize(
    ("rows", "epochs", "processes", "batch_size", "accumulation"),
    [
        (320, 3, 1, 8, 1),  # recipes/taskmaster-smollm2.yaml
        (3_339, 3, 1, 8, 1),
        (266, 3, 1, 4, 1),  # 8 would give fewer than 100 steps
        (267, 3, 1, 8, 1),
        (10, 8, 1, 4, 1),  # never fewer than 4
        (6_000, 3, 1, 8, 2),  # 16 leave 1,125 steps
        (100_000, 2, 1, 8, 16),
        (1_000_000, 1, 1, 8, 16),  # never more than 128
        (1_000_000, 1, 8, 8, 2),
        (320, 3, 8, 1, 1),
        (100, 3, 8, 1, 1),  # every process needs a conversation
        (320, 3, 3, 3, 1),
    ],
)
def test_the_batch_leaves_enough_steps(rows, epochs, processes, batch_size, accumulation):
    found = choose_batch(rows, epochs, processes)
    assert (found.batch_size, found.accumulation) == (batch_size, accumulation)


def test_a_batch_that_the_processes_enlarge_is_named():
    assert "4 would suit these rows" in choose_batch(100, 3, 8).reason
    assert "would suit" not in choose_batch(320, 3, 8).reason


# --- the held-out share -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "share"),
    [(10, 0.2), (250, 0.2), (251, 0.2), (400, 0.12), (500, 0.1), (10_000, 0.1), (20_000, 0.05), (1_000_000, 0.001)],
)
def test_a_tenth_is_held_out_but_neither_few_nor_many(rows, share):
    found = choose_held_out(rows, np.arange(min(rows, 1000), dtype=np.uint64))
    assert found.fraction == pytest.approx(share)
    assert found.conversations == pytest.approx(share * rows, rel=0.1)


def test_too_few_held_out_conversations_are_named():
    assert "too few to tell checkpoints apart" in choose_held_out(90, np.arange(90, dtype=np.uint64)).reason
    assert "too few" not in choose_held_out(100, np.arange(100, dtype=np.uint64)).reason


@pytest.mark.parametrize("rows", [1, 2, 500])
def test_conversations_with_one_and_the_same_first_prompt_cannot_be_divided(rows):
    found = choose_held_out(rows, np.zeros(rows, dtype=np.uint64))
    assert (found.fraction, found.conversations) == (0.0, 0)
    assert "data.test" in found.reason


def test_conversations_with_the_same_first_prompt_are_held_out_together():
    keys = np.repeat(np.arange(5, dtype=np.uint64), 100)  # a tenth of 500 is half of a group
    assert choose_held_out(500, keys).conversations == 100


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held_out", "each", "training", "turns", "limit"),
    [
        (371, 1.9, 10_000, "all", None),
        (371, 1.9, 760, "all", 100),  # 4 models of 1.9 answers of a second: 100 conversations
        (371, 1.9, 752, "last", 180),
        (371, 1.0, 10_000, "last", None),
        (371, 1.9, 1, "last", 20),  # the fewest that give an interval
        (10, 1.9, 1, "last", 10),
        (50, 2.0, 400, "all", None),  # all that are held out
    ],
)
def test_evaluation_takes_no_longer_than_training(held_out, each, training, turns, limit):
    found = choose_evaluation(held_out, each, 1.0, 4, training)
    assert (found.turns.value, found.limit.value) == (turns, limit)
    if limit not in (10, 20):
        assert found.seconds <= training


def test_an_evaluation_that_takes_longer_says_so():
    assert "take longer than the training" in choose_evaluation(371, 1.9, 1.0, 4, 1).limit.reason
    assert "no longer than the training" in choose_evaluation(371, 1.9, 1.0, 4, 752).limit.reason


# --- the work of a run ------------------------------------------------------------------------------------


@given(lengths, st.integers(1, 1000), st.integers(64, 4096))
def test_the_lengths_of_a_run_are_those_of_the_sample(rows, count, max_length):
    sizes = sizes_of_run(rows, np.ones_like(rows), max_length, count)
    assert len(sizes) == count
    assert sizes.tokens.max() <= max_length
    assert (sizes.supervised <= sizes.tokens).all()
    assert set(sizes.tokens.tolist()) <= {min(length, max_length) for length in rows.tolist()}


def test_numbers_as_text():
    assert [count_text(n) for n in (999, 260_032, 134_515_008, 7_248_023_552)] == ["999", "260K", "135M", "7.25B"]
    assert [percent(share) for share in (0, 0.0001, 0.001, 0.5)] == ["0.0 %", "0.01 %", "0.1 %", "50.0 %"]
