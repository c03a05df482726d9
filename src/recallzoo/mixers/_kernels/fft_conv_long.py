"""Causal convolutions by Fourier transforms that no processor holds, in parts: Triton.

What `fft_conv` says, of T = N0 M positions, M = N1 N2. In three digits, n = n0 M + m and
k = k0 + N0 k', one index k0 of the transform of w x at a time asks for

    z_k0[m] = sum over n0 of x[n0 M + m] u_k0^n0      u_k0 = exp(i a_k0 / N0), a_k0 = pi/2 - 2 pi k0

and is, in k', the transform of M positions of exp(i a_k0 m / T) z_k0[m]. (Polynomials modulo
z^T - i are so by the Chinese remainder theorem: z^T - i is the product of z^M - u_k0.) A part is
thus the convolution of `fft_conv` with numbers that are complex, a_k0 / N0 in the place of pi / 2
in F1 and E, and tables by k0. Its result, c_k0, is complex too, and with all parts

    y[n0 M + m] = Re (1 / N0) sum over k0 of u_k0^-n0 c_k0[m]

A program makes z_k0 from the N0 pieces of x, holds it to the end and stores c_k0; another kernel
adds the parts. Between them c_k0 is float16 and a scale. Numbers that have 1 as their largest in
magnitude, of real or of imaginary part, have a root mean square of at least M^-1/2 and a largest
of (2 M)^1/2 in their transform, so float16 holds that of P, c_k0 up to a scale, and the product of
two such spectra.

Letters  C channels, B sequences, L positions of x, T = N0 N1 N2 >= L positions of the transform,
M = N1 N2 positions of a part.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from recallzoo.mixers._fft_products import Tables
from recallzoo.mixers._kernels.fft_conv import (
    along_rows,
    back_along_rows,
    complex_at,
    largest,
    options,
    reciprocal,
)

LOWER = tl.constexpr(1 / 128)
"""M^-1/2 or less, for every M here. c_k0 without its scale may be as small as this in root mean
square, so scales are kept times this: they are finite where y is."""
BLOCK = 1024
"""Positions of each part that a program adds up: whole runs of a thread, which then adds alone."""


@triton.jit
def _spectrum(
    x, L, turns, first, twiddle, second, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr
):
    """Real and imaginary parts of the spectrum of z / N0, and a number that these are to be
    multiplied by. `turns` holds u^n0 / N0."""
    n1 = tl.arange(0, N1)
    m = n1[:, None] * N2 + tl.arange(0, N2)[None, :]
    real = tl.zeros([N1, N2], tl.float32)
    imaginary = tl.zeros([N1, N2], tl.float32)
    # Two pieces at a time: more of them take registers that are not to be had.
    for n0 in tl.range(0, N0, loop_unroll_factor=2, num_stages=1):
        n = n0 * (N1 * N2) + m
        piece = tl.load(x + n, mask=n < L, other=0.0).to(tl.float32)
        real += piece * tl.load(turns + 2 * n0)
        imaginary += piece * tl.load(turns + 2 * n0 + 1)
    scale = largest(tl.maximum(tl.abs(real), tl.abs(imaginary)))
    right_real = (real * reciprocal(scale)).to(tl.float16)
    right_imaginary = (imaginary * reciprocal(scale)).to(tl.float16)
    # One plane of F1 at a time: shared memory has room for the planes of two programs.
    square = n1[:, None] * N1 + n1[None, :]
    left = tl.load(first + square)
    real = tl.dot(left, right_real)
    imaginary = tl.dot(left, right_imaginary)
    left = tl.load(first + N1 * N1 + square)
    imaginary = tl.dot(left, right_real, imaginary)
    real = tl.dot(left, -right_imaginary, real)
    real, imaginary = along_rows(real, imaginary, twiddle, second, N1, N2)
    return real, imaginary, scale


@triton.jit
def _store_signal(real, imaginary, part, first, back, second, N1: tl.constexpr, N2: tl.constexpr):
    """c of the spectrum P = real + i imaginary; its scale, times LOWER, is returned."""
    n1 = tl.arange(0, N1)
    m = n1[:, None] * N2 + tl.arange(0, N2)[None, :]
    below_real, below_imaginary, scale = back_along_rows(real, imaginary, back, second, N1, N2)
    # F1 transposed, conjugate.
    square = n1[None, :] * N1 + n1[:, None]
    left = tl.load(first + square)
    real = tl.dot(left, below_real)
    imaginary = tl.dot(left, below_imaginary)
    left = tl.load(first + N1 * N1 + square)
    real = tl.dot(left, below_imaginary, real)
    imaginary = tl.dot(left, -below_real, imaginary)
    tl.store(part + m, real.to(tl.float16))
    tl.store(part + N1 * N2 + m, imaginary.to(tl.float16))
    return scale * LOWER


@triton.jit
def _filter(
    x, spectrum, spectrum_scale, parts, part_scales, turns, first, twiddle, back, second, B, L,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N1 * N2
    # The programs of a sequence run together, as they read the same x; so do those of a channel.
    program = tl.program_id(0).to(tl.int64)
    row, k0 = program // N0, program % N0
    channel = row // B
    m = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    turns += k0 * (2 * N0)
    first += k0 * (2 * N1 * N1)
    twiddle += k0 * (2 * M)
    back += k0 * (2 * M)
    real, imaginary, scale = _spectrum(x + row * L, L, turns, first, twiddle, second, N0, N1, N2)
    by_real, by_imaginary = complex_at(spectrum + (channel * N0 + k0) * (2 * M), m, M)
    product = real * by_real - imaginary * by_imaginary
    imaginary = real * by_imaginary + imaginary * by_real
    parts += program * (2 * M)
    inner_scale = _store_signal(product, imaginary, parts, first, back, second, N1, N2)
    scale = inner_scale * scale * tl.load(spectrum_scale + channel)
    tl.store(part_scales + program, scale)


@triton.jit
def _gradient_of_x(
    x, d_y, spectrum, spectrum_scale, parts, part_scales, products, product_scales,
    turns, first, twiddle, back, second, B, L,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """And, for that of the taps, the product of the spectra of d_y and of x, conjugate."""
    M: tl.constexpr = N1 * N2
    program = tl.program_id(0).to(tl.int64)
    row, k0 = program // N0, program % N0
    channel = row // B
    m = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    turns += k0 * (2 * N0)
    first += k0 * (2 * N1 * N1)
    twiddle += k0 * (2 * M)
    back += k0 * (2 * M)
    real, imaginary, x_scale = _spectrum(x + row * L, L, turns, first, twiddle, second, N0, N1, N2)
    # It waits in memory: there is no room for a second one beside it.
    products += program * (2 * M)
    tl.store(products + m, real.to(tl.float16))
    tl.store(products + M + m, imaginary.to(tl.float16))
    tl.debug_barrier()
    real, imaginary, scale = _spectrum(d_y + row * L, L, turns, first, twiddle, second, N0, N1, N2)
    by_real, by_imaginary = complex_at(products, m, M)
    tl.debug_barrier()
    tl.store(products + m, (real * by_real + imaginary * by_imaginary).to(tl.float16))
    tl.store(products + M + m, (imaginary * by_real - real * by_imaginary).to(tl.float16))
    tl.store(product_scales + program, scale * x_scale)
    by_real, by_imaginary = complex_at(spectrum + (channel * N0 + k0) * (2 * M), m, M)
    product = real * by_real + imaginary * by_imaginary
    imaginary = imaginary * by_real - real * by_imaginary
    parts += program * (2 * M)
    inner_scale = _store_signal(product, imaginary, parts, first, back, second, N1, N2)
    scale = inner_scale * scale * tl.load(spectrum_scale + channel)
    tl.store(part_scales + program, scale)


@triton.jit
def _gradient_of_taps(
    products, product_scales, parts, part_scales, first, back, second, B,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = N1 * N2
    program = tl.program_id(0).to(tl.int64)
    channel, k0 = program // N0, program % N0
    m = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    real = tl.zeros([N1, N2], tl.float32)
    imaginary = tl.zeros([N1, N2], tl.float32)
    for b in range(B):
        row = (channel * B + b) * N0 + k0
        scale = tl.load(product_scales + row)
        of_real, of_imaginary = complex_at(products + row * (2 * M), m, M)
        real += of_real * scale
        imaginary += of_imaginary * scale
    first += k0 * (2 * N1 * N1)
    back += k0 * (2 * M)
    parts += program * (2 * M)
    scale = _store_signal(real, imaginary, parts, first, back, second, N1, N2)
    # The spectrum of x is that of a transform that keeps lengths, G is not; and both spectra here
    # are of z / N0, where one was to be.
    tl.store(part_scales + program, scale * N0 * tl.sqrt(tl.full([], M, tl.float32)))


@triton.jit
def _sum_of_parts(
    parts, part_scales, turns, y, L, N0: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):
    """y of c_k0 / N0."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // (M // BLOCK), program % (M // BLOCK)
    m = block * BLOCK + tl.arange(0, BLOCK)
    k0 = tl.arange(0, N0)
    real, imaginary = complex_at(parts + row * (2 * M * N0), k0[:, None] * (2 * M) + m[None, :], M)
    scale = tl.load(part_scales + row * N0 + k0)[:, None]
    for n0 in range(N0):
        at = k0 * (2 * N0) + 2 * n0
        cosine = tl.load(turns + at)[:, None] * (N0 / LOWER)
        sine = tl.load(turns + at + 1)[:, None] * (N0 / LOWER)
        signal = tl.sum((real * cosine + imaginary * sine) * scale, axis=0)
        n = n0 * M + m
        tl.store(y + row * L + n, signal.to(y.dtype.element_ty), mask=n < L)


def forward(x: Tensor, spectrum: Tensor, scale: Tensor, tables: Tables) -> Tensor:
    """y [C, B, L] in the dtype of x [C, B, L], from G = scale [C] spectrum [C, N0, 2, N1, N2]."""
    C, B, L = x.shape
    _, N0, _, N1, N2 = spectrum.shape
    parts, part_scales = _empty_parts(C * B, spectrum)
    _filter[(C * B * N0,)](
        x, spectrum, scale, parts, part_scales, *_of_kernels(tables), B, L, N0, N1, N2,
        **options(N1, N2),
    )  # fmt: skip
    return _whole(parts, part_scales, tables, torch.empty_like(x))


def backward(
    x: Tensor, spectrum: Tensor, scale: Tensor, d_y: Tensor, tables: Tables
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of the taps [C, L], in float32."""
    C, B, L = x.shape
    _, N0, _, N1, N2 = spectrum.shape
    parts, part_scales = _empty_parts(C * B, spectrum)
    products, product_scales = _empty_parts(C * B, spectrum)
    given = _of_kernels(tables)
    _gradient_of_x[(C * B * N0,)](
        x, d_y, spectrum, scale, parts, part_scales, products, product_scales, *given, B, L,
        N0, N1, N2, **options(N1, N2),
    )  # fmt: skip
    d_x = _whole(parts, part_scales, tables, torch.empty_like(x))
    _, first, _, back, second = given
    _gradient_of_taps[(C * N0,)](
        products, product_scales, parts, part_scales, first, back, second, B, N0, N1, N2,
        **options(N1, N2),
    )  # fmt: skip
    return d_x, _whole(parts, part_scales, tables, torch.empty(C, L, device=x.device))


def _whole(parts: Tensor, part_scales: Tensor, tables: Tables, y: Tensor) -> Tensor:
    """y [..., L], whose rows are the first of `parts`."""
    L = y.shape[-1]
    _, N0, _, M = parts.shape
    block = min(BLOCK, M)
    _sum_of_parts[(y.numel() // L * (M // block),)](
        parts, part_scales, tables.turns, y, L, N0, M, block
    )
    return y


def _empty_parts(rows: int, spectrum: Tensor) -> tuple[Tensor, Tensor]:
    _, N0, _, N1, N2 = spectrum.shape
    numbers = torch.empty(rows, N0, 2, N1 * N2, dtype=torch.float16, device=spectrum.device)
    return numbers, torch.empty(rows, N0, device=spectrum.device)


def _of_kernels(tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tables.turns, tables.first, tables.twiddle, tables.back, tables.second
