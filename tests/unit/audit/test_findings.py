"""Suspicious rows, from tables of losses that were made by hand."""

import numpy as np

from minisft.audit.findings import excess_losses, latest, learned_at_once, losses_by_epoch, never_falling
from minisft.row_losses import make_records


def test_losses_are_sorted_by_row_and_visit():
    records = np.concatenate([
        make_records(1, np.array([2, 0]), np.array([3.0, 1.0])),
        make_records(2, np.array([0]), np.array([np.nan])),
    ])  # fmt: skip
    found = losses_by_epoch(records, 4)
    assert found.shape == (4, 2)
    assert found[0].tolist() == [1.0, np.inf]
    assert found[2][0] == 3.0
    assert np.isnan(found[[1, 1, 2, 3, 3], [0, 1, 1, 0, 1]]).all()
    assert latest(found)[[0, 2]].tolist() == [np.inf, 3.0]


def test_a_row_that_does_not_fall_is_found_where_the_others_fall():
    losses = np.array([[3.0, 1.5], [3.0, 2.9], [2.0, 2.1], [3.0, 1.0], [3.0, 1.2]])
    assert never_falling(losses).tolist() == [1, 2]
    assert never_falling(losses + 30).tolist() == []  # no row falls much
    assert never_falling(losses[:, :1]).tolist() == []  # seen once


def test_a_row_that_is_learned_at_once_is_found_where_the_others_are_not():
    losses = np.array([[3.0, 2.0], [3.0, 0.1], [0.01, 0.01], [2.0, 1.0], [2.0, 1.5]])
    assert learned_at_once(losses).tolist() == [2, 1]
    assert learned_at_once(losses[:, :1]).tolist() == [2]
    assert learned_at_once(losses / 1000).tolist() == []


def test_a_loss_is_compared_with_those_of_its_time():
    high, low = [make_records(1 + at, np.arange(70), np.full(70, loss)) for at, loss in enumerate((5.0, 1.0))]
    high["loss"][3], low["loss"][3], low["loss"][4] = 7.0, 2.0, np.nan
    found = excess_losses(np.concatenate([high, low]))
    assert found["loss"][:70].tolist() == [2.0 if row == 3 else 0.0 for row in range(70)]
    assert found["loss"][70:75].tolist() == [0.0, 0.0, 0.0, 1.0, np.inf]
    assert latest(losses_by_epoch(found, 71))[[3, 4]].tolist() == [1.0, np.inf]


def test_no_losses_give_no_findings():
    empty = losses_by_epoch(make_records(1, np.zeros(0), np.zeros(0)), 3)
    assert never_falling(empty).tolist() == learned_at_once(empty).tolist() == []
    assert np.isnan(latest(empty)).all()
