"""Causal convolutions of thousands of positions by Fourier transforms made of matrix products.

`conv_by_fft_products` is `recallzoo.mixers._convolution.causal_conv` by the kernels of
`_kernels/fft_conv.py`, which say how. Where cuFFT works in float32 on twice the length and moves
each stage through memory, they take a transform of the length itself, on tensor cores, within a
processor.

Products are of float16 with float32 sums: y differs from exact sums by 6e-4 of its root mean square
(white noise of 4,096 to 16,384 positions), where rounding y to bfloat16 costs 1.7e-3. The error is
of one size all along a row, that of both halves of the whole convolution, of which the second one,
past the last position, is not returned: small positions beside large ones are less exact than by
tiles, and a position may take from later ones what rounding leaves of them.

Letters   B batch, T time, D width, K filter taps, C channels, N1 and N2 rows and columns.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import product_dtype
from recallzoo.mixers._groups import over_groups

SIZES = {2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16_384: (128, 128)}
"""Rows and columns of transforms by their length. As a thread has few registers, rows come first:
the stages that take most products are those of columns."""
SMALLEST = 1e-30
"""What numbers are divided by at least: its reciprocal is finite, and zeros stay zeros."""


class Tables(NamedTuple):
    """What transforms of a size have in common."""

    first: Float[Tensor, "2 N1 N1"]
    """F1 of the kernels; this and the next three are float16."""
    second: Float[Tensor, "2 N2 N2"]
    """F2."""
    twiddle: Float[Tensor, "2 N1 N2"]
    """E."""
    back: Float[Tensor, "2 N1 N2"]
    """conj(E)."""
    weights: Tensor
    """w [T], complex."""


def conv_channels_by_fft_products(
    x: Float[Tensor, "D B T"], taps: Float[Tensor, "D K"], size: tuple[int, int] | None = None
) -> Float[Tensor, "D B T"]:
    """`causal_conv_channels` by kernels: CUDA with Triton (and, for tests, its interpreter), up to
    the largest of SIZES. `size` is rows and columns of the transform, powers of two and 16 or more;
    the smallest of SIZES that holds T unless given. ValueError if there is none."""
    seq_len = x.shape[-1]
    rows, columns = size or transform_size(seq_len)
    if rows * columns < seq_len:
        raise ValueError(f"a transform of {rows} x {columns} cannot hold {seq_len} positions.")
    taps = F.pad(taps[..., :seq_len].float(), (0, max(0, seq_len - taps.shape[-1])))
    x_low = x.to(product_dtype(x)).contiguous()
    return fft_products(x_low, taps, rows, columns).to(x.dtype)


def conv_by_fft_products(
    x: Float[Tensor, "B T D"], taps: Float[Tensor, "D K"], size: tuple[int, int] | None = None
) -> Float[Tensor, "B T D"]:
    """`causal_conv` by the same kernels."""
    return conv_channels_by_fft_products(x.movedim(-1, 0), taps, size).movedim(0, -1)


def transform_size(seq_len: int) -> tuple[int, int]:
    """Rows and columns of the smallest transform that holds `seq_len` positions."""
    for length, size in SIZES.items():
        if seq_len <= length:
            return size
    raise ValueError(f"transforms made of products hold {max(SIZES)} positions, not {seq_len}.")


@torch.library.custom_op("recallzoo::fft_products", mutates_args=())
def fft_products(x: Tensor, taps: Tensor, rows: int, columns: int) -> Tensor:
    """y [C, B, T], of the dtype of x, from x [C, B, T] and taps [C, T] in float32."""
    from recallzoo.mixers._kernels import fft_conv as kernel

    tables = _tables(rows, columns, x.device)
    return kernel.forward(x.contiguous(), *_spectrum(taps, tables), tables)


@torch.library.custom_op("recallzoo::fft_products_backward", mutates_args=())
def _backward(
    x: Tensor, taps: Tensor, d_y: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels import fft_conv as kernel

    tables = _tables(rows, columns, x.device)
    spectrum, scale = _spectrum(taps, tables)
    return kernel.backward(x.contiguous(), spectrum, scale, d_y.contiguous(), tables)


def _spectrum(taps: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """The transform G of w taps as G[k1, k2] = scale [C] spectrum [C, 2, N1, N2], whose largest
    number is 1, in float16. Once a channel: by cuFFT, in float32."""
    num_channels, seq_len = taps.shape
    N1, N2 = tables.twiddle.shape[1:]
    weighted = taps * tables.weights[:seq_len]
    planes = torch.view_as_real(torch.fft.fft(weighted, n=N1 * N2))
    scale = torch.linalg.vector_norm(planes.flatten(1), torch.inf, dim=1).clamp(min=SMALLEST)
    spectrum = torch.empty(num_channels, 2, N1, N2, dtype=torch.float16, device=taps.device)
    by_k1_k2 = planes.unflatten(1, (N2, N1)).permute(0, 3, 2, 1)
    torch.mul(by_k1_k2, scale.reciprocal()[:, None, None, None], out=spectrum)
    return spectrum, scale


def _tables(rows: int, columns: int, device: torch.device) -> Tables:
    key = rows, columns, device
    if key in _kept:
        return _kept[key]
    tables = _make_tables(rows, columns, device)
    # Memory that a CUDA graph allocates while it is captured is the graph's.
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _kept[key] = tables
    return tables


_kept: dict[tuple[int, int, torch.device], Tables] = {}


def _make_tables(rows: int, columns: int, device: torch.device) -> Tables:
    length = rows * columns
    n1 = torch.arange(rows, device=device)
    n2 = torch.arange(columns, device=device)
    n = torch.arange(length, device=device)
    # Whole numbers of fractions of a turn: of 4 rows, columns, 4 times the length.
    first = _turns(n1 - 4 * n1[:, None] * n1, 4 * rows) / rows**0.5
    second = _turns(-n2[:, None] * n2, columns) / columns**0.5
    twiddle = _turns(n2 - 4 * n1[:, None] * n2, 4 * length)
    weights = _turns(n, 4 * length)
    return Tables(
        _planes(first),
        _planes(second),
        _planes(twiddle),
        _planes(twiddle.conj()),
        weights.to(torch.complex64),
    )


def _turns(numerator: Tensor, denominator: int) -> Tensor:
    """exp(2 pi i numerator / denominator) in double precision."""
    angle = (numerator % denominator).double() * (2 * torch.pi / denominator)
    return torch.polar(torch.ones_like(angle), angle)


def _planes(numbers: Tensor) -> Tensor:
    return torch.stack([numbers.real, numbers.imag]).half()


@fft_products.register_fake
def _(x: Tensor, taps: Tensor, rows: int, columns: int) -> Tensor:  # noqa: ARG001
    return _dense(x)


@_backward.register_fake
def _(
    x: Tensor,
    taps: Tensor,
    d_y: Tensor,  # noqa: ARG001
    rows: int,  # noqa: ARG001
    columns: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return _dense(x), _dense(taps)


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    x, taps, ctx.rows, ctx.columns = inputs
    ctx.save_for_backward(x, taps)


def _differentiate(ctx, d_y):
    x, taps = ctx.saved_tensors
    return *_backward(x, taps, d_y.contiguous(), ctx.rows, ctx.columns), None, None


fft_products.register_autograd(_differentiate, setup_context=_save)


for _operator in (fft_products, _backward):
    _operator.register_vmap(over_groups(_operator))
