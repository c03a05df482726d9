"""The convolution through frequencies that compiles equals the one that PyTorch differentiates."""

import pytest
import torch

from recallzoo.mixers._fft_conv import by_operator, written_out

RUNS = 2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, x, taps):
    y = function(x, taps)
    return y, *torch.autograd.grad(y, (x, taps), draw(*y.shape, seed=1))


@pytest.mark.parametrize(("seq_len", "num_taps"), [(1, 1), (20, 20), (33, 5)])
def test_values_and_gradients_are_equal(seq_len, num_taps):
    x, taps = draw(3, 2, seq_len).requires_grad_(), draw(3, num_taps, seed=2).requires_grad_()
    got, wanted = with_gradients(by_operator, x, taps), with_gradients(written_out, x, taps)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_runs_have_filters_of_their_own(compiled):
    x, taps = draw(RUNS, 3, 2, 9).requires_grad_(), draw(RUNS, 3, 9, seed=2).requires_grad_()

    def mapped(x, taps):
        return torch.func.vmap(by_operator)(x, taps)

    function = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    got = with_gradients(function, x, taps)
    wanted = with_gradients(lambda *inputs: torch.func.vmap(written_out)(*inputs), x, taps)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
