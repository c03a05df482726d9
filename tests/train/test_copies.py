"""Gradients that lie in one tensor. Their mean over processes: test_pretrain_processes.py."""

import torch
from torch import Tensor, nn

from recallzoo.train._copies import ALIGNMENT, SharedGradients


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def test_gradients_add_up_as_usual_where_they_are():
    shared, usual = model(), model()
    gradients = SharedGradients(list(shared.parameters()))
    places = [grad.data_ptr() for grad in grads(shared)]
    assert all((place - places[0]) % (4 * ALIGNMENT) == 0 for place in places)
    for seed in (1, 2):
        backward(shared, seed)
        backward(usual, seed)
    for mine, plain in zip(grads(shared), grads(usual), strict=True):
        assert torch.equal(mine, plain)
    assert [grad.data_ptr() for grad in grads(shared)] == places
    gradients.clear()
    assert not any(grad.any() for grad in grads(shared))
    backward(shared, 3)
    assert [grad.data_ptr() for grad in grads(shared)] == places
