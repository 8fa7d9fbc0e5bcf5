"""The loss of each source of the data."""

import numpy as np
import torch

from minisft.training.batching import pack_sequences
from minisft.training.source_losses import SourceLosses


def test_losses_are_added_to_the_source_of_their_conversation():
    conversations = [(np.array([5, 6, 7]), np.array([-100, 6, 7])), (np.array([8, 9]), np.array([-100, 9]))]
    sources = SourceLosses(["a", "b"], np.array([1, 0, 1]))
    sources.start_step(torch.device("cpu"))
    sources.add(pack_sequences(conversations, (2, 1)), torch.tensor([1.0, 2.0, 4.0]))
    sources.add(pack_sequences(conversations[:1], (0,)), torch.tensor([8.0, 16.0]))
    means = sources.log(lambda tensor: torch.cat([tensor, tensor]))  # two processes with equal shares
    assert sources.logged == {
        "a": {"loss_sum": 8.0, "supervised_tokens": 2},
        "b": {"loss_sum": 54.0, "supervised_tokens": 8},
    }
    assert means == {"loss_by_source/a": 4.0, "loss_by_source/b": 6.75}


def test_a_source_without_tokens_in_a_step_has_no_mean():
    sources = SourceLosses(["a", "b"], np.array([1]))
    sources.start_step(torch.device("cpu"))
    sources.add(pack_sequences([(np.array([5, 6]), np.array([-100, 6]))], (0,)), torch.tensor([2.0]))
    assert sources.log(lambda tensor: tensor) == {"loss_by_source/b": 2.0}
    assert sources.logged["a"] == {"loss_sum": 0.0, "supervised_tokens": 0}
