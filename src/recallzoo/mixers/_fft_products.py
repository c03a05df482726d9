"""Causal convolutions of thousands of positions by Fourier transforms made of matrix products.

`conv_channels_by_fft_products` is `recallzoo.mixers._convolution.causal_conv_channels` by kernels
of `_kernels/fft_conv.py`, which say how. Where cuFFT works in float32 on twice the length and moves
each stage through memory, they take a transform of the length itself, on tensor cores, within a
processor; above 16,384 positions `_kernels/fft_conv_long.py` takes it in parts.

Products are of float16 with float32 sums: y differs from exact sums by 7e-4 of its root mean square
(white noise of 4,096 to 65,536 positions), where rounding y to bfloat16 costs 1.7e-3. The error is
of one size all along a row, that of both halves of the whole convolution, of which the second one,
past the last position, is not returned: small positions beside large ones are less exact than by
tiles, and a position may take from later ones what rounding leaves of them.

Letters   B batch, T time, D width, K filter taps, C channels, N0 parts, N1 and N2 rows and columns
          of each.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import product_dtype
from recallzoo.mixers._groups import over_groups


class Size(NamedTuple):
    """Of a transform of rows x columns x parts positions."""

    rows: int
    columns: int
    parts: int = 1


SIZES = {
    2048: Size(64, 32),
    4096: Size(64, 64),
    8192: Size(128, 64),
    16_384: Size(128, 128),
    32_768: Size(128, 64, 4),
    65_536: Size(128, 64, 8),
}
"""Transforms by their length. As a thread has few registers, rows come first: the stages that take
most products are those of columns. Parts of 8,192 positions take 3/4 of the products of parts of
twice that, and leave room for two programs on a processor."""
SMALLEST = 1e-30
"""What numbers are divided by at least: its reciprocal is finite, and zeros stay zeros."""


class Tables(NamedTuple):
    """What transforms of a size have in common."""

    first: Float[Tensor, "N0 2 N1 N1"]
    """F1 of the kernels; this and the next three are float16."""
    second: Float[Tensor, "2 N2 N2"]
    """F2."""
    twiddle: Float[Tensor, "N0 2 N1 N2"]
    """E."""
    back: Float[Tensor, "N0 2 N1 N2"]
    """conj(E)."""
    weights: Tensor
    """w [T], complex."""
    turns: Float[Tensor, "N0 N0 2"]
    """u_k0^n0 / N0, its real and imaginary part, in float32."""


def conv_channels_by_fft_products(
    x: Float[Tensor, "D B T"], taps: Float[Tensor, "D K"], size: Size | None = None
) -> Float[Tensor, "D B T"]:
    """`causal_conv_channels` by kernels: CUDA with Triton (and, for tests, its interpreter), up to
    the largest of SIZES. `size` is of powers of two, rows and columns 16 or more; the smallest of
    SIZES that holds T unless given. ValueError if there is none."""
    seq_len = x.shape[-1]
    size = size or transform_size(seq_len)
    if math.prod(size) < seq_len:
        of = " x ".join(map(str, size))
        raise ValueError(f"a transform of {of} cannot hold {seq_len} positions.")
    taps = F.pad(taps[..., :seq_len].float(), (0, max(0, seq_len - taps.shape[-1])))
    x_low = x.to(product_dtype(x)).contiguous()
    return fft_products(x_low, taps, *size).to(x.dtype)


def transform_size(seq_len: int) -> Size:
    """The smallest transform that holds `seq_len` positions."""
    for length, size in SIZES.items():
        if seq_len <= length:
            return size
    raise ValueError(f"transforms made of products hold {max(SIZES)} positions, not {seq_len}.")


@torch.library.custom_op("recallzoo::fft_products", mutates_args=())
def fft_products(x: Tensor, taps: Tensor, rows: int, columns: int, parts: int) -> Tensor:
    """y [C, B, T], of the dtype of x, from x [C, B, T] and taps [C, T] in float32."""
    tables = _tables(Size(rows, columns, parts), x.device)
    return _kernel(parts).forward(x.contiguous(), *_spectrum(taps, tables), tables)


@torch.library.custom_op("recallzoo::fft_products_backward", mutates_args=())
def _backward(
    x: Tensor, taps: Tensor, d_y: Tensor, rows: int, columns: int, parts: int
) -> tuple[Tensor, Tensor]:
    tables = _tables(Size(rows, columns, parts), x.device)
    spectrum, scale = _spectrum(taps, tables)
    return _kernel(parts).backward(x.contiguous(), spectrum, scale, d_y.contiguous(), tables)


def _kernel(parts: int) -> ModuleType:
    # Without Triton they are not to be had.
    from recallzoo.mixers._kernels import fft_conv, fft_conv_long

    return fft_conv if parts == 1 else fft_conv_long


def _spectrum(taps: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """The transform G of w taps as G[k0 + N0 (k1 + N1 k2)] = scale [C] times
    spectrum [C, N0, 2, N1, N2], whose largest number is 1, in float16. Once a channel: by cuFFT,
    in float32."""
    num_channels, seq_len = taps.shape
    N0, _, N1, N2 = tables.twiddle.shape
    weighted = taps * tables.weights[:seq_len]
    planes = torch.view_as_real(torch.fft.fft(weighted, n=N0 * N1 * N2))
    scale = torch.linalg.vector_norm(planes.flatten(1), torch.inf, dim=1).clamp(min=SMALLEST)
    spectrum = torch.empty(num_channels, N0, 2, N1, N2, dtype=torch.float16, device=taps.device)
    by_digits = planes.unflatten(1, (N2, N1, N0)).permute(0, 3, 4, 2, 1)
    torch.mul(by_digits, scale.reciprocal()[:, None, None, None, None], out=spectrum)
    return spectrum, scale


def _tables(size: Size, device: torch.device) -> Tables:
    key = size, device
    if key in _kept:
        return _kept[key]
    tables = _make_tables(size, device)
    # Memory that a CUDA graph allocates while it is captured is the graph's.
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _kept[key] = tables
    return tables


_kept: dict[tuple[Size, torch.device], Tables] = {}


def _make_tables(size: Size, device: torch.device) -> Tables:
    rows, columns, parts = size
    length = math.prod(size)
    n0 = torch.arange(parts, device=device)
    n1 = torch.arange(rows, device=device)
    n2 = torch.arange(columns, device=device)
    n = torch.arange(length, device=device)
    # Whole numbers of fractions of a turn. A quarter is what w adds to minus the frequency, here
    # k0 + N0 k1.
    quarters = 1 - 4 * (n0[:, None, None] + parts * n1[:, None])
    first = _turns(quarters * n1, 4 * parts * rows) / rows**0.5
    second = _turns(-n2[:, None] * n2, columns) / columns**0.5
    twiddle = _turns(quarters * n2, 4 * length)
    turns = _turns(quarters[:, 0] * n0, 4 * parts) / parts
    return Tables(
        _planes(first),
        _planes(second),
        _planes(twiddle),
        _planes(twiddle.conj()),
        _turns(n, 4 * length).to(torch.complex64),
        torch.view_as_real(turns.to(torch.complex64)).contiguous(),
    )


def _turns(numerator: Tensor, denominator: int) -> Tensor:
    """exp(2 pi i numerator / denominator) in double precision."""
    angle = (numerator % denominator).double() * (2 * torch.pi / denominator)
    return torch.polar(torch.ones_like(angle), angle)


def _planes(numbers: Tensor) -> Tensor:
    return torch.stack([numbers.real, numbers.imag], dim=-3).half()


@fft_products.register_fake
def _(x: Tensor, taps: Tensor, rows: int, columns: int, parts: int) -> Tensor:  # noqa: ARG001
    return _dense(x)


@_backward.register_fake
def _(
    x: Tensor,
    taps: Tensor,
    d_y: Tensor,  # noqa: ARG001
    rows: int,  # noqa: ARG001
    columns: int,  # noqa: ARG001
    parts: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return _dense(x), _dense(taps)


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    x, taps, *ctx.size = inputs
    ctx.save_for_backward(x, taps)


def _differentiate(ctx, d_y):
    x, taps = ctx.saved_tensors
    return *_backward(x, taps, d_y.contiguous(), *ctx.size), None, None, None


fft_products.register_autograd(_differentiate, setup_context=_save)


for _operator in (fft_products, _backward):
    _operator.register_vmap(over_groups(_operator))
