"""The attention kernel equals attention written out, dropout included, alone, packed and compiled.

The kernels run in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch

from recallzoo.mixers import Context
from recallzoo.mixers._softmax import attend

pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo.mixers._short_attention import short_attention

pytestmark = pytest.mark.unchecked  # wrapped kernels lose their globals in the interpreter

KEY = 0x1234_5678_9ABC_DEF0
RUNS = 2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(qkv, bias, num_heads, context, dropout):
    q, k, v = (
        p.unflatten(-1, (num_heads, -1)).transpose(-2, -3) for p in (qkv + bias).chunk(3, dim=-1)
    )
    return attend(q, k, v, context, dropout=dropout).transpose(-2, -3).flatten(-2)


def with_gradients(function, qkv, bias, *options):
    y = function(qkv, bias, *options)
    return y, *torch.autograd.grad(y, [qkv, bias], draw(*y.shape, seed=1))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("num_sequences", "seq_len", "num_heads", "head_dim"),
    [(2, 5, 1, 16), (1, 1, 1, 16), (2, 70, 2, 16), (1, 33, 3, 5), (1, 32, 3, 5), (1, 64, 1, 64)],
)
def test_the_kernel_is_attention_with_the_same_weights_dropped(
    num_sequences, seq_len, num_heads, head_dim, dropout
):
    qkv = draw(num_sequences, seq_len, 3 * num_heads * head_dim).requires_grad_()
    bias = draw(qkv.shape[-1], seed=2).requires_grad_()
    key = torch.tensor(KEY)
    got = with_gradients(short_attention, qkv, bias, num_heads, Context(dropout_key=key), dropout)
    wanted = with_gradients(written_out, qkv, bias, num_heads, Context(dropout_key=key), dropout)
    for value, exact in zip(got, wanted, strict=True):
        # Sums of at most 70 products in float32, in blocks.
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


def test_nothing_is_dropped_outside_of_training():
    qkv = draw(1, 9, 48)
    got = short_attention(qkv, None, 1, Context(), 0.5)
    wanted = written_out(qkv, torch.zeros(48), 1, Context(), 0.5)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_runs_drop_by_keys_of_their_own(compiled):
    qkv, bias = draw(RUNS, 3, 20, 96).requires_grad_(), draw(RUNS, 96, seed=2).requires_grad_()
    keys = torch.tensor([KEY, KEY + 1])

    def mapped(function):
        def of_run(qkv, bias, key):
            return function(qkv, bias, 2, Context(dropout_key=key), 0.3)

        return lambda qkv, bias, keys: torch.func.vmap(of_run)(qkv, bias, keys)

    kernel = mapped(short_attention)
    if compiled:
        kernel = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    got = with_gradients(kernel, qkv, bias, keys)
    wanted = with_gradients(mapped(written_out), qkv, bias, keys)
    for value, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)
