"""The losses of the rows of a step, collected over forwards, steps and processes."""

import numpy as np
import torch

from minisft.training.batching import pack_sequences
from minisft.training.step_row_losses import RowLossBuffer

LONG = np.array([5, 6, 7]), np.array([-100, 6, 7])
SHORT = np.array([8, 9]), np.array([-100, 9])
CPU = torch.device("cpu")


def test_the_losses_of_a_row_are_added_up_over_forwards_and_processes():
    buffer = RowLossBuffer()
    buffer.start_step(4, (7, 2, 1, 3), CPU)
    buffer.add(pack_sequences([LONG, SHORT], (2, 1)), torch.tensor([1.0, 2.0, 4.0]))
    buffer.add(pack_sequences([LONG], (3,)), torch.tensor([8.0, 16.0]))
    other = torch.tensor([[32.0, 0, 0, 0]], dtype=torch.float64)  # the process with row 7
    [step] = buffer.collect(lambda own: torch.cat([own, other]))
    assert step.step == 4
    assert step.rows.tolist() == [7, 2, 1, 3]
    assert step.sums.tolist() == [32.0, 3.0, 4.0, 24.0]
    assert buffer.collect(lambda own: own) == []


def test_steps_that_are_not_logged_are_collected_together():
    buffer = RowLossBuffer()
    for number in range(1, 4):
        buffer.start_step(number, (number,) * 1, CPU)
        buffer.add(pack_sequences([SHORT], (number,)), torch.tensor([float(number)]))
    assert [(one.step, one.rows.tolist(), one.sums.tolist()) for one in buffer.collect(lambda own: own)] == [
        (1, [1], [1.0]), (2, [2], [2.0]), (3, [3], [3.0]),
    ]  # fmt: skip


def test_a_forward_without_conversations_adds_nothing():
    buffer = RowLossBuffer()
    buffer.start_step(1, (0,), CPU)
    empty = pack_sequences([LONG], ())
    buffer.add(empty, torch.tensor([1.0, 2.0]))
    assert buffer.collect(lambda own: own)[0].sums.tolist() == [0.0]


def test_the_buffer_is_full_after_a_hundred_steps():
    buffer = RowLossBuffer()
    for step in range(100):
        assert not buffer.is_full
        buffer.start_step(step, (0,), CPU)
    assert buffer.is_full
