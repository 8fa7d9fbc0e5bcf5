"""A step is the same conversations however it is split; nothing is lost, repeated or padded."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from minisft.training.batching import (
    IGNORED,
    PackedRow,
    RowDataset,
    Sizes,
    StepSampler,
    balance_ranks,
    fill_bins,
    measure_lengths,
    pack_sequences,
    steps_of_epoch,
)

LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=60)


def sizes_of(lengths):
    lengths = np.array(lengths)
    return Sizes(lengths, np.maximum(1, lengths // 2))


def steps(sizes, processes, seed=0, epoch=0, row_tokens=200, global_batch=8):
    ranks = []
    for rank in range(processes):
        sampler = StepSampler(
            sizes, global_batch=global_batch, row_tokens=row_tokens, processes=processes, rank=rank, seed=seed
        )
        sampler.epoch = epoch
        ranks.append(list(sampler))
    return [list(step) for step in zip(*ranks, strict=True)]


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 400))
def test_every_conversation_once_in_the_same_step(lengths, processes, row_tokens):
    sizes = sizes_of(lengths)
    alone = [{i for plan in step[0] for i in plan.indexes} for step in steps(sizes, 1)]
    together = steps(sizes, processes, row_tokens=row_tokens)
    for whole, step in zip(alone, together, strict=True):
        dealt = [index for rank in step for plan in rank for index in plan.indexes]
        assert sorted(dealt) == sorted(whole)
        assert len({len(rank) for rank in step}) == 1, "every process runs the same number of forwards"
        totals = {(plan.step_tokens, plan.step_supervised) for rank in step for plan in rank}
        assert totals == {(sizes.tokens[dealt].sum(), sizes.supervised[dealt].sum())}
    assert sorted(index for whole in alone for index in whole) == list(range(len(lengths)))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 400))
def test_rows_keep_to_their_budget(lengths, row_tokens):
    rows = fill_bins(lengths, row_tokens)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[position] for position in row) <= row_tokens for row in rows)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(1, 5))
def test_conversations_are_distributed_evenly(lengths, processes):
    loads = [sum(lengths[position] for position in share) for share in balance_ranks(lengths, processes)]
    assert max(loads) - min(loads) <= max(lengths)


def test_epochs_and_seeds_differ_and_repeat():
    sizes = sizes_of(range(2, 42))
    assert steps(sizes, 1) == steps(sizes, 1)
    assert steps(sizes, 1) != steps(sizes, 1, epoch=1)
    assert steps(sizes, 1) != steps(sizes, 1, seed=1)


def test_a_row_holds_the_conversations_as_prepared():
    first = np.array([5, 6, 7, 8]), np.array([IGNORED, IGNORED, 7, 8])
    second = np.array([9, 3, 4]), np.array([9, IGNORED, 4])
    row = pack_sequences([first, second])
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert row.lengths == (4, 3)
    # 7 is predicted at 6, 8 at 7, 4 at 3; the 9 that opens a conversation is predicted by nothing.
    assert row.predict_at.tolist() == [1, 2, 5]
    assert row.targets.tolist() == [7, 8, 4]


def test_sizes_are_those_of_the_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    random = np.random.default_rng(0)
    rows = []
    for length in random.integers(2, 30, 20):
        ids = random.integers(0, 99, length)
        rows.append({"input_ids": ids, "labels": np.where(random.random(length) < 0.5, ids, IGNORED)})
        rows[-1]["labels"][-1] = ids[-1]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    dataset = datasets.load_from_disk(str(tmp_path / "d"))
    sizes = measure_lengths(dataset)
    for step in steps(sizes, 1):
        for plan in step[0]:
            row, _ = RowDataset(dataset)[plan]
            assert sum(row.lengths) == sizes.tokens[list(plan.indexes)].sum()
            assert len(row.targets) == sizes.supervised[list(plan.indexes)].sum()


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 3), st.integers(1, 4))
def test_packs_hold_every_conversation_once_and_steps_count_packs(lengths, epoch, global_batch):
    lengths = np.array(lengths)
    how = {"global_batch": global_batch, "pack_tokens": 300, "seed": 1}
    epochs = [steps_of_epoch(lengths, epoch=at, **how) for at in (epoch, epoch + 1)]
    assert len(epochs[0]) == len(epochs[1])  # the number of steps is known before the first
    for step in epochs[0]:
        assert lengths[step].sum() <= global_batch * 300
    assert sorted(np.concatenate(epochs[0]).tolist()) == list(range(len(lengths)))
    packs = len(fill_bins(lengths.tolist(), 300))
    assert len(epochs[0]) == -(-packs // global_batch)


def test_a_row_on_a_gpu_is_not_read_back():
    """A GPU computes behind the CPU; tensors without numbers raise where the CPU would have to wait for them."""
    with FakeTensorMode():
        row = torch.empty((1, 4), dtype=torch.int64, device="cuda")
        assert PackedRow(row, row, (4,), row[0, :2], row[0, :2], (0,)).targets.device.type == "cuda"
