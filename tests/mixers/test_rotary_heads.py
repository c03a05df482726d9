"""Heads turned by a kernel equal those turned by `rotate`, gradients included."""

import importlib.util

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from recallzoo.mixers import _rotary_heads
from recallzoo.mixers._contract import Context
from recallzoo.mixers._rotary import rotate
from recallzoo.mixers._rotary_heads import is_fused, turned_heads
from recallzoo.mixers.attention import Attention

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is missing"),
]

WHOLE = [((1, 1, 1, 2), 2), ((2, 9, 3, 8), 8), ((3, 20, 5, 64), 64), ((1, 70, 2, 96), 96)]
PARTIAL = [((1, 1, 1, 4), 2), ((2, 9, 3, 8), 4), ((3, 20, 5, 64), 32), ((2, 11, 3, 96), 48)]
UNEVEN = [((2, 9, 3, 10), 8), ((1, 20, 3, 64), 16), ((2, 5, 2, 14), 4), ((1, 5, 3, 64), 62)]


def written_out(qkv: Tensor, num_heads: int, rotary_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    position = torch.arange(qkv.shape[1])
    return rotate(q, position, rotary_dim), rotate(k, position, rotary_dim), v


def draw(batch: int, seq_len: int, num_heads: int, head_dim: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, seq_len, 3 * num_heads * head_dim, generator=generator)
    gradients = torch.randn(3, batch, num_heads, seq_len, head_dim, generator=generator)
    return qkv.requires_grad_(), gradients.unbind(0)


@pytest.mark.parametrize(("size", "rotary_dim"), WHOLE + PARTIAL + UNEVEN)
def test_values_and_gradients_equal_those_written_out(size, rotary_dim):
    qkv, gradients = draw(*size)
    got = turned_heads(qkv, size[2], rotary_dim)
    wanted = written_out(qkv, size[2], rotary_dim)
    # One product and one sum in float32, in another order at most.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    one, other = (torch.autograd.grad(found, qkv, gradients) for found in (got, wanted))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity by zero, not chosen
def test_channels_that_are_not_turned_pass_bit_for_bit():
    qkv, gradients = draw(2, 9, 3, 8)
    with torch.no_grad():
        qkv[0, 3, 6::8] = torch.inf
    got, wanted = turned_heads(qkv, 3, 4), written_out(qkv, 3, 4)
    rest = [[part[..., 4:] for part in parts] for parts in (got, wanted)]
    torch.testing.assert_close(*rest, rtol=0, atol=0)
    (d_qkv,) = torch.autograd.grad(got, qkv, gradients)
    by_head = d_qkv.unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(by_head[..., 4:], torch.stack(gradients)[..., 4:], rtol=0, atol=0)


@pytest.mark.parametrize("rotary_dim", [2, 4, 8])
def test_packed_runs_equal_single_ones(rotary_dim):
    runs = [draw(2, 9, 3, 8, seed) for seed in range(3)]
    qkv = torch.stack([run[0] for run in runs])
    gradients = [torch.stack([run[1][i] for run in runs]) for i in range(3)]
    packed = torch.func.vmap(lambda one: turned_heads(one, 3, rotary_dim))(qkv)
    (d_packed,) = torch.autograd.grad(packed, qkv, gradients)
    for i, (one, of_one) in enumerate(runs):
        alone = turned_heads(one, 3, rotary_dim)
        torch.testing.assert_close([part[i] for part in packed], list(alone), rtol=0, atol=0)
        torch.testing.assert_close(d_packed[i], torch.autograd.grad(alone, one, of_one)[0])


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_attention_with_the_kernel_equals_attention_without(fraction, monkeypatch):
    torch.manual_seed(0)
    mixer = Attention(24, 9, num_heads=3, positions="rotary", rotary_fraction=fraction)
    x, context = torch.randn(2, 9, 24), Context()
    wanted = mixer(x, context)
    turned = []
    monkeypatch.setattr(_rotary_heads, "is_fused", lambda *_: turned.append(True) or True)
    # As above; the products with the weights are the same.
    torch.testing.assert_close(mixer(x, context), wanted, rtol=1e-5, atol=1e-6)
    assert turned


@pytest.mark.parametrize("half", [1, 2])
def test_the_operator_is_known_to_the_compiler(half):
    qkv, _ = draw(2, 5, 2, 4)
    tables = torch.rand(2, 1, 5, half, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.library.opcheck(_rotary_heads._apart, (qkv, *tables, 2))


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "wanted"),
    [(64, 64, True), (64, 32, True), (96, 48, True), (64, 0, False), (33, 16, False)],
)
def test_a_kernel_turns_even_heads_whole_or_in_part(head_dim, rotary_dim, wanted):
    with FakeTensorMode():
        qkv = torch.empty(1, 4, 3 * head_dim, device="cuda", dtype=torch.bfloat16)
        assert is_fused(qkv, head_dim, rotary_dim) is wanted
        assert not is_fused(qkv.float(), head_dim, rotary_dim)
