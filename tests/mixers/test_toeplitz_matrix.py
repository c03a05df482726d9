"""Toeplitz matrices by kernel equal those written out, alone, packed and compiled.

The kernels run in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch

from recallzoo.mixers import _toeplitz_matrix as toeplitz
from recallzoo.mixers._convolution import causal_conv, causal_conv_channels

pytest.importorskip("triton", reason="Triton is not installed")

RUNS = 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_kernel(taps: torch.Tensor) -> torch.Tensor:
    return toeplitz._matrix(taps, taps.dtype)


def with_gradient(function, taps: torch.Tensor):
    matrix = function(taps)
    [gradient] = torch.autograd.grad(matrix, taps, draw(*matrix.shape, seed=1))
    return matrix, gradient


@pytest.mark.parametrize("seq_len", [1, 2, 16, 33])
def test_the_kernel_writes_the_matrix_and_sums_its_diagonals(seq_len):
    taps = draw(3, seq_len).requires_grad_()
    got, wanted = with_gradient(by_kernel, taps), with_gradient(toeplitz.written_out, taps)
    assert torch.equal(got[0], wanted[0])
    # At most 33 terms in float32, added in another order.
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=1e-5)


def test_a_matrix_of_more_columns_than_a_block_is_whole():
    taps = draw(1, 260)
    assert torch.equal(by_kernel(taps), toeplitz.written_out(taps))


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_runs_have_a_matrix_for_each_channel_of_each(compiled):
    taps = draw(RUNS, 2, 9).requires_grad_()

    def mapped(taps):
        return torch.func.vmap(by_kernel)(taps)

    function = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    got = with_gradient(function, taps)
    wanted = with_gradient(lambda taps: torch.func.vmap(toeplitz.written_out)(taps), taps)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("seq_len", "num_taps"), [(20, 20), (20, 3), (20, 12), (150, 150)])
def test_channels_first_is_the_same_convolution(seq_len, num_taps):
    x, taps = draw(4, 2, seq_len), draw(4, num_taps, seed=1)
    got = causal_conv_channels(x, taps)
    wanted = causal_conv(x.movedim(0, -1), taps).movedim(-1, 0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
