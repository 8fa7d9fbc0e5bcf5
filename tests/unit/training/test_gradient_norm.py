"""The norm of gradients against fp64, and clipping against torch's."""

import pytest
import torch

from minisft.training.optimization import clip_gradients, gradient_norm


def test_the_norm_of_a_large_tensor_is_exact():
    torch.manual_seed(0)
    gradients = [torch.randn(8192, 576), torch.randn(576), torch.randn(3, 5, 7), torch.tensor(2.0)]
    exact = torch.stack([gradient.double().pow(2).sum() for gradient in gradients]).sum().sqrt().item()
    assert gradient_norm(gradients).item() == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_gradients_are_clipped_as_by_torch(max_norm):
    torch.manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.zeros(4, 3)),
        torch.nn.Parameter(torch.zeros(5)),
        torch.nn.Parameter(torch.zeros(2)),
    ]
    theirs = [torch.nn.Parameter(torch.zeros_like(one)) for one in ours]
    for mine, other in zip(ours[:2], theirs[:2], strict=True):  # the third has no gradient
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = clip_gradients(ours, max_norm)
    assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=1e-6)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_infinity_and_nothing():
    assert torch.isinf(gradient_norm([torch.tensor([1.0, torch.inf])]))
    assert torch.isnan(gradient_norm([torch.tensor([1.0, torch.nan])]))
    assert gradient_norm([]).item() == 0.0
