"""The loss of each source of the data."""

import numpy as np

from minisft.training.source_losses import SourceLosses
from minisft.training.step_row_losses import StepRowLosses


def test_losses_are_added_to_the_source_of_their_conversation():
    sources = SourceLosses(["a", "b"], np.array([1, 0, 1]), np.array([2, 1, 3]))
    means = sources.log(StepRowLosses(1, np.array([2, 1, 0]), np.array([3.0, 4.0, 24.0])))
    assert sources.logged == {
        "a": {"loss_sum": 4.0, "supervised_tokens": 1},
        "b": {"loss_sum": 27.0, "supervised_tokens": 5},
    }
    assert means == {"loss_by_source/a": 4.0, "loss_by_source/b": 5.4}


def test_a_source_without_tokens_in_a_step_has_no_mean():
    sources = SourceLosses(["a", "b"], np.array([1]), np.array([1]))
    assert sources.log(StepRowLosses(1, np.array([0]), np.array([2.0]))) == {"loss_by_source/b": 2.0}
    assert sources.logged["a"] == {"loss_sum": 0.0, "supervised_tokens": 0}
