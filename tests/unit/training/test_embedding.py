"""One gradient of the embedding for the rows of a step is the sum of theirs."""

import pytest
import torch

from minisft.training.loss import accumulate_embedding_gradient, row_loss
from tests.unit.training.test_loss_in_chunks import CAPPED, LLAMA, NEOX, TIED, make, make_row

ROWS = [make_row(3, 20), make_row(1, 15), make_row(2, 9)]


def gradients(model, *, together):
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    seen = []
    with accumulate_embedding_gradient(model) as lookups:
        for row in ROWS:
            lookups.last = row is ROWS[-1] or not together
            (row_loss(model, row) / 50).backward()
            seen.append(model.get_input_embeddings().weight.grad is not None)
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}, seen


def plain_gradients(model):
    model.zero_grad()
    torch.manual_seed(0)
    for row in ROWS:
        (row_loss(model, row) / 50).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("config", [LLAMA, TIED, CAPPED, NEOX], ids=["untied", "tied", "scaled and padded", "dropout"])
def test_it_is_the_sum_of_the_rows_gradients(config, together):
    model = make(config)
    expected = plain_gradients(model)
    found, seen = gradients(model, together=together)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    if config is LLAMA:  # its head has a weight of its own
        assert seen == ([False, False, True] if together else [True, True, True])


def test_no_more_is_kept_than_the_embedding_has_rows():
    model = make(LLAMA)
    layer = model.get_input_embeddings()
    many = -(-layer.num_embeddings // len(ROWS[0].input_ids[0]))
    expected = [layer.num_embeddings > number * len(ROWS[0].input_ids[0]) for number in range(1, many + 1)]
    assert expected == [True] * (many - 1) + [False]
    waits = []
    with accumulate_embedding_gradient(model) as lookups:
        for _ in range(many):
            row_loss(model, ROWS[0]).backward()
            waits.append(bool(lookups.ids))
    assert waits == expected


def test_the_row_of_padding_gets_none():
    model = make(LLAMA)
    model.get_input_embeddings().padding_idx = int(ROWS[0].input_ids[0, 0])
    expected = plain_gradients(model)
    torch.testing.assert_close(gradients(model, together=True)[0], expected, rtol=1e-5, atol=1e-7)


def test_afterwards_the_layer_is_as_it_was():
    model = make(LLAMA)
    layer = model.get_input_embeddings()
    with accumulate_embedding_gradient(model):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    with pytest.raises(RuntimeError), accumulate_embedding_gradient(model):
        raise RuntimeError
    assert "forward" not in vars(layer)


def test_a_frozen_embedding_is_left_alone():
    model = make(TIED)
    model.get_input_embeddings().weight.requires_grad_(False)
    with accumulate_embedding_gradient(model):
        assert "forward" not in vars(model.get_input_embeddings())
