"""Heads turned by a kernel equal those turned by `rotate`, gradients included."""

import importlib.util

import pytest
import torch
from torch import Tensor

from recallzoo.mixers import _rotary_heads
from recallzoo.mixers._rotary import rotate
from recallzoo.mixers._rotary_heads import turned_heads

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is missing"),
]

SIZES = [(1, 1, 1, 2), (2, 9, 3, 8), (3, 20, 5, 64), (1, 70, 2, 96)]


def written_out(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    position = torch.arange(qkv.shape[1])
    return rotate(q, position, q.shape[-1]), rotate(k, position, k.shape[-1]), v


def draw(batch: int, seq_len: int, num_heads: int, head_dim: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, seq_len, 3 * num_heads * head_dim, generator=generator)
    gradients = torch.randn(3, batch, num_heads, seq_len, head_dim, generator=generator)
    return qkv.requires_grad_(), gradients.unbind(0)


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_equal_those_written_out(size):
    qkv, gradients = draw(*size)
    got, wanted = turned_heads(qkv, size[2]), written_out(qkv, size[2])
    # One product and one sum in float32, in another order at most.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    one, other = (torch.autograd.grad(found, qkv, gradients) for found in (got, wanted))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_packed_runs_equal_single_ones():
    runs = [draw(2, 9, 3, 8, seed) for seed in range(3)]
    qkv = torch.stack([run[0] for run in runs])
    gradients = [torch.stack([run[1][i] for run in runs]) for i in range(3)]
    packed = torch.func.vmap(lambda one: turned_heads(one, 3))(qkv)
    (d_packed,) = torch.autograd.grad(packed, qkv, gradients)
    for i, (one, of_one) in enumerate(runs):
        alone = turned_heads(one, 3)
        torch.testing.assert_close([part[i] for part in packed], list(alone), rtol=0, atol=0)
        torch.testing.assert_close(d_packed[i], torch.autograd.grad(alone, one, of_one)[0])


def test_the_operator_is_known_to_the_compiler():
    qkv, _ = draw(2, 5, 2, 4)
    tables = torch.rand(2, 1, 5, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.library.opcheck(_rotary_heads._apart, (qkv, *tables))
