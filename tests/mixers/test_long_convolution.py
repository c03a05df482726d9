"""Long convolutions as matrix products equal the Fourier transform, gradients included."""

import importlib.util

import pytest
import torch

from recallzoo.mixers import _long_convolution
from recallzoo.mixers._convolution import conv_channels_by_fft
from recallzoo.mixers._long_convolution import conv_channels_by_tiles

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton, or its interpreter, is missing"
)


def conv_by_tiles(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    return conv_channels_by_tiles(x.movedim(-1, 0), taps).movedim(0, -1)


def conv_by_fft(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    return conv_channels_by_fft(x.movedim(-1, 0), taps).movedim(0, -1)


def draw(batch: int, seq_len: int, width: int, num_taps: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, seq_len, width, generator=generator, requires_grad=True)
    taps = torch.randn(width, num_taps, generator=generator) / num_taps**0.5
    d_y = torch.randn(batch, seq_len, width, generator=generator)
    return x, taps.requires_grad_(), d_y


def assert_as_by_fft(batch: int, seq_len: int, width: int, num_taps: int) -> None:
    x, taps, d_y = draw(batch, seq_len, width, num_taps)
    got, wanted = conv_by_tiles(x, taps), conv_by_fft(x, taps[:, :seq_len])
    # Sums of up to 200 terms of size 1 in float32, by two algorithms; the taps' gradient sums over
    # the batch as well.
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    for one, other in zip(
        torch.autograd.grad(got, (x, taps), d_y),
        torch.autograd.grad(wanted, (x, taps), d_y),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("batch", "seq_len", "width", "num_taps"),
    [
        (1, 1, 1, 1),
        (2, 64, 2, 64),
        (3, 65, 2, 200),
        (17, 130, 1, 70),
        (2, 200, 3, 3),
        (2, 300, 2, 64),
        (1, 330, 2, 65),
        (2, 300, 1, 129),
    ],
)
def test_tiles_equal_the_fourier_transform(batch, seq_len, width, num_taps):
    assert_as_by_fft(batch, seq_len, width, num_taps)


def test_output_at_t_ignores_inputs_after_t():
    x, taps, _ = draw(2, 150, 2, 150)
    changed = x.detach().clone()
    changed[:, 100:] += 1.0
    torch.testing.assert_close(
        conv_by_tiles(changed, taps)[:, :100], conv_by_tiles(x, taps)[:, :100]
    )


def test_low_precision_inputs_are_summed_in_float32():
    # float16, since Triton's interpreter does not multiply in bfloat16.
    x, taps, _ = draw(2, 150, 2, 150)
    low = x.detach().half()
    got = conv_by_tiles(low, taps)
    assert got.dtype == torch.float16
    wanted = conv_by_fft(low.float(), taps.half().float())
    # One rounding to float16, of 11 bits, at the end.
    torch.testing.assert_close(got.float(), wanted, rtol=2**-10, atol=2**-9)


def test_tiles_pack():
    """Runs with filters of their own, mapped over, equal one after another, gradients included."""
    runs = [draw(2, 70, 2, 70, seed) for seed in range(3)]
    x, taps, d_y = (torch.stack([run[i] for run in runs]) for i in range(3))
    y = torch.func.vmap(conv_by_tiles)(x, taps)
    packed = (y, *torch.autograd.grad(y, (x, taps), d_y))
    for i, (x_i, taps_i, d_y_i) in enumerate(runs):
        y_i = conv_by_tiles(x_i, taps_i)
        alone = (y_i, *torch.autograd.grad(y_i, (x_i, taps_i), d_y_i))
        for one, other in zip(packed, alone, strict=True):
            torch.testing.assert_close(one[i], other, rtol=0, atol=0)


def test_the_operator_is_known_to_the_compiler():
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    taps = torch.randn(2, 10, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.library.opcheck(_long_convolution.toeplitz, (x, taps))
