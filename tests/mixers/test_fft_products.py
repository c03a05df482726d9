"""Fourier transforms made of float16 products equal the sum over lags in float64.

Tolerances are of the root mean square of what is wanted. A transform there and back rounds its
numbers to 11 bits seven times, in parts eight times, and its matrices: 7e-4 of it in a typical
position, 9e-4 for the taps' gradient, whose two factors are both rounded. TYPICAL allows for that,
LARGEST for the farthest of the hundreds to thousands of positions drawn here, 5 deviations.
"""

import importlib.util
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from recallzoo.mixers._convolution import FFT_PRODUCTS, conv_channels_by_fft
from recallzoo.mixers._fft_products import (
    SIZES,
    Size,
    conv_channels_by_fft_products,
    fft_products,
    transform_size,
)

pytestmark = [
    pytest.mark.unchecked,  # wrapped kernels lose their globals in the interpreter
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton, or its interpreter, is missing"
    ),
]
TYPICAL, LARGEST = 1.2e-3, 6e-3
SMALL = Size(16, 16)
IN_PARTS = Size(16, 16, 2)
FORMS = pytest.mark.parametrize(
    "form",
    [
        pytest.param(partial(conv_channels_by_fft_products, size=size), id=name)
        for name, size in [("whole", SMALL), ("in_parts", IN_PARTS)]
    ],
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(channels: int, batch: int, seq_len: int, num_taps: int) -> tuple[Tensor, Tensor, Tensor]:
    x = draw(channels, batch, seq_len)
    return x, draw(channels, num_taps, seed=1), draw(channels, batch, seq_len, seed=2)


def by_definition(x: Tensor, taps: Tensor) -> Tensor:
    """The sum over lags, in float64, one lag at a time."""
    x, taps = x.double(), taps.double()
    y = torch.zeros_like(x)
    for lag in range(min(x.shape[-1], taps.shape[-1])):
        past = torch.nn.functional.pad(x, (lag, 0))[..., : x.shape[-1]]
        y = y + taps[:, None, lag, None] * past
    return y


def with_gradients(form, x: Tensor, taps: Tensor, d_y: Tensor) -> tuple[Tensor, ...]:
    x, taps = x.detach().requires_grad_(), taps.detach().requires_grad_()
    y = form(x, taps)
    return y.detach(), *torch.autograd.grad(y, (x, taps), d_y.to(y.dtype))


def assert_near(got: Tensor, wanted: Tensor) -> None:
    error = (got.double() - wanted.double()).abs()
    size = wanted.double().square().mean().sqrt()
    assert error.square().mean().sqrt() <= TYPICAL * size
    assert error.max() <= LARGEST * size


@pytest.mark.parametrize(
    ("size", "channels", "batch", "seq_len", "num_taps"),
    [
        ((16, 16), 2, 3, 256, 256),
        ((16, 16), 3, 1, 129, 129),
        ((16, 32), 1, 2, 512, 20),
        ((32, 16), 2, 2, 301, 400),
        ((32, 16), 1, 5, 17, 1),
        ((16, 16, 2), 2, 3, 512, 512),
        ((16, 32, 2), 1, 1, 700, 1000),
        ((32, 16, 4), 2, 2, 1501, 301),
        ((16, 16, 4), 1, 3, 1024, 1024),
        ((16, 16, 8), 1, 2, 19, 2),
        ((64, 32, 2), 1, 1, 2500, 100),
    ],
)
def test_values_and_gradients_are_those_of_the_sum_over_lags(
    size, channels, batch, seq_len, num_taps
):
    given = inputs(channels, batch, seq_len, num_taps)
    form = partial(conv_channels_by_fft_products, size=Size(*size))
    got = with_gradients(form, *given)
    for one, other in zip(got, with_gradients(by_definition, *given), strict=True):
        assert one.dtype == torch.float32
        assert_near(one, other)


@pytest.mark.parametrize("length", SIZES)
def test_transforms_that_are_used_hold_their_length_and_agree_with_cufft_s_form(length):
    seq_len = length - 1
    given = inputs(1, 2 if length <= 16_384 else 1, seq_len, seq_len)
    got = with_gradients(conv_channels_by_fft_products, *given)
    for one, other in zip(got, with_gradients(conv_channels_by_fft, *given), strict=True):
        assert_near(one, other)


@FORMS
@pytest.mark.parametrize("of_x", [1e-4, 1e4])
@pytest.mark.parametrize("of_taps", [1e-4, 1e4])
@pytest.mark.parametrize("of_d_y", [1e-9, 1e4])
def test_scales_that_float16_does_not_hold_do_no_harm(form, of_x, of_taps, of_d_y):
    x, taps, d_y = inputs(1, 2, 200, 200)
    given = (of_x * x, of_taps * taps, of_d_y * d_y)
    got = with_gradients(form, *given)
    for one, other in zip(got, with_gradients(by_definition, *given), strict=True):
        assert_near(one, other)


@FORMS
def test_a_sequence_is_as_exact_beside_one_a_million_times_as_large(form):
    x, taps, d_y = inputs(2, 2, 200, 200)
    loud = torch.tensor([1.0, 1e6])
    x, taps, d_y = x * loud[:, None], taps * loud[:, None], d_y / loud[:, None]
    got = with_gradients(form, x, taps, d_y)
    wanted = with_gradients(by_definition, x, taps, d_y)
    for one, other in zip(got[:2], wanted[:2], strict=True):
        for channel in range(2):
            for b in range(2):
                assert_near(one[channel, b], other[channel, b])
    for channel in range(2):
        assert_near(got[2][channel], wanted[2][channel])


@FORMS
def test_a_constant_or_a_single_number_does_not_overflow(form):
    taps = torch.ones(1, 256)
    x = torch.stack([torch.ones(256), torch.eye(256)[0], torch.eye(256)[255]])[None]
    got, wanted = form(x, taps), by_definition(x, taps)
    for b in range(3):
        # Of all 512 positions of the whole convolution: the last number reaches one of the 256.
        size = (
            by_definition(torch.nn.functional.pad(x, (0, 256)), taps)[0, b].square().mean().sqrt()
        )
        assert (got[0, b] - wanted[0, b]).abs().max() <= LARGEST * size


def test_a_part_that_is_all_imaginary_does_not_overflow():
    taps, piece = draw(1, 512, seed=1), draw(1, 1, 256)
    x = torch.cat([-piece / 2**0.5, piece], dim=-1)  # 1 and exp(i pi/4) are what they are times.
    assert_near(conv_channels_by_fft_products(x, taps, IN_PARTS), by_definition(x, taps))


@FORMS
@pytest.mark.parametrize("largest", [1e-38, 3e38])
def test_the_smallest_and_largest_numbers_are_not_lost(form, largest):
    x, taps, _ = inputs(1, 2, 100, 1)
    x = x / x.abs().max() * largest
    x[0, 1] = largest  # Its spectrum is nearly one number.
    taps = torch.full_like(taps, 0.125)
    wanted = by_definition(x, taps)
    error = form(x, taps).double() - wanted
    # Numbers below 1e-30 are divided by that, and float16 has steps of 6e-8.
    assert error.abs().max() <= LARGEST * wanted.square().mean().sqrt() + 1e-37


@FORMS
def test_zeros_give_zeros(form):
    x, taps, d_y = inputs(1, 2, 100, 100)
    x[0, 0], d_y[0, 1] = 0.0, 0.0
    y, d_x, _ = with_gradients(form, x, taps, d_y)
    assert not y[0, 0].any()
    assert y[0, 1].all()
    assert not d_x[0, 1].any()
    assert d_x[0, 0].all()
    given = (x, 0 * taps, 0 * d_y)
    for one in with_gradients(form, *given):
        assert not one.any()


@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_sight_and_in_its_row(form, value):
    x, taps, d_y = inputs(2, 2, 100, 100)
    x[0, 1, 30] = value
    y, d_x, d_taps = with_gradients(form, x, taps, d_y)
    assert not y[0, 1, 30:].isfinite().any()
    assert not d_taps[0, :70].isfinite().any()
    assert y[0, 0].isfinite().all()
    assert y[1].isfinite().all()
    assert d_taps[1].isfinite().all()
    assert d_x.isfinite().all()
    x, taps, d_y = inputs(2, 2, 100, 100)
    taps[0, 30] = value
    y = form(x, taps)
    assert not y[0, :, 30:].isfinite().any()
    assert y[1].isfinite().all()
    x, taps, d_y = inputs(2, 2, 100, 100)
    d_y[0, 1, 30] = value
    _, d_x, d_taps = with_gradients(form, x, taps, d_y)
    assert not d_x[0, 1, :31].isfinite().any()
    assert not d_taps[0, :31].isfinite().any()
    assert d_x[0, 0].isfinite().all()
    assert d_taps[1].isfinite().all()


def test_the_dtype_stays():
    x, taps, _ = inputs(2, 2, 100, 100)
    assert conv_channels_by_fft_products(x.half(), taps, SMALL).dtype == torch.float16


@FORMS
def test_runs_with_filters_of_their_own_pack(form):
    x, taps, d_y = draw(2, 2, 2, 70), draw(2, 2, 70, seed=1), draw(2, 2, 2, 70, seed=2)
    packed = with_gradients(torch.func.vmap(form), x, taps, d_y)
    for run in range(2):
        alone = with_gradients(form, x[run], taps[run], d_y[run])
        for one, other in zip(packed, alone, strict=True):
            torch.testing.assert_close(one[run], other, rtol=0, atol=0)


@pytest.mark.parametrize("size", [SMALL, IN_PARTS])
def test_the_operator_is_known_to_the_compiler(size):
    x, taps = draw(1, 2, 20).requires_grad_(), draw(1, 20, seed=1).requires_grad_()
    torch.library.opcheck(fft_products, (x, taps, *size))


def test_every_length_that_is_given_to_it_has_a_transform():
    for lengths in FFT_PRODUCTS:
        for seq_len in (lengths.start, lengths.stop - 1):
            assert seq_len <= math.prod(transform_size(seq_len)) < 2 * seq_len


def test_a_length_that_no_transform_holds_is_refused():
    x, taps, _ = inputs(1, 1, 257, 257)
    with pytest.raises(ValueError, match="16 x 16 x 1 cannot hold 257"):
        conv_channels_by_fft_products(x, taps, SMALL)
    with pytest.raises(ValueError, match="hold 65536 positions, not 65537"):
        transform_size(65_537)
