"""Causal convolution by a Fourier transform of its own length, made of matrix products: Triton.

    y[c, b, t] = sum over s <= t of taps[c, t - s] x[c, b, s]

With weights w[n] = exp(i pi n / 2T), the cyclic convolution of w x and w taps over T positions is
w[n] (y[n] + i y[n + T]): y is the real part of its product with conj(w), and nothing is padded. For
the unitary transform U and W = diag(w), y = Re(conj(W) U* G U W x), G being diagonal and the
transform, not unitary, of w taps. The gradient of x is the same of d_y and conj(G); that of the
taps is the same of d_y and the conjugate transform of w x in the place of G.

In rows and columns, T = N1 N2, n = n1 N2 + n2 and k = k1 + N1 k2, U W x is made of products:

    Z = ((F1 X) * E) F2      F1[k1, n1] = exp(i pi n1 / 2 N1 - 2 pi i k1 n1 / N1) / N1^(1/2)
                             E[k1, n2]  = exp(2 pi i n2 (1/4 - k1) / T)
                             F2[n2, k2] = exp(-2 pi i n2 k2 / N2) / N2^(1/2)

F1 meets real numbers, and of what its transpose gives the real part is wanted: two products of real
matrices each; F2 takes four each way. A program holds a sequence from its first product to its
last. Products are of float16 with float32 sums. What enters them is divided by its largest number
before the transform and again before its inverse, which are unitary: nothing between grows past
T^(1/2), and float16 holds it. Where an input is not finite, all of its row of y is not a number, as
by any Fourier transform. (The weights: the right-angle convolution of Crandall and Fagin, 1994.
Transforms as products of matrices on tensor cores: Fu et al., FlashFFTConv, 2023.)

Complex numbers are planes: all real parts, then all imaginary ones. Transforms that no processor
holds are made in parts, by `fft_conv_long`.

Letters  C channels, B sequences, L positions of x, T = N1 N2 >= L positions of the transform.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from recallzoo.mixers._fft_products import SMALLEST, Tables

LEAST = tl.constexpr(SMALLEST)
TWO_PROGRAMS = 8192
"""Length of transforms up to which the registers of a processor do for two programs or more, of
MAX_REGISTERS a thread: one then computes while another loads. A few numbers are spilled for it."""
MAX_REGISTERS = 128


@triton.jit
def complex_at(planes, at, size):
    """Real and imaginary parts in float32; `size` elements lie between them."""
    return tl.load(planes + at).to(tl.float32), tl.load(planes + size + at).to(tl.float32)


@triton.jit
def largest(values):
    return tl.maximum(tl.max(values), LEAST)


@triton.jit
def reciprocal(scale):
    # GPUs divide by numbers from 2^126 as if these were infinite.
    return 0.25 / (0.25 * scale)


@triton.jit
def along_rows(real, imaginary, twiddle, second, N1: tl.constexpr, N2: tl.constexpr):
    """(A * E) F2 of A = real + i imaginary."""
    n1, n2 = tl.arange(0, N1), tl.arange(0, N2)
    n = n1[:, None] * N2 + n2[None, :]
    by_real, by_imaginary = complex_at(twiddle, n, N1 * N2)
    left_real = (real * by_real - imaginary * by_imaginary).to(tl.float16)
    left_imaginary = (real * by_imaginary + imaginary * by_real).to(tl.float16)
    square = n2[:, None] * N2 + n2[None, :]
    right_real, right_imaginary = tl.load(second + square), tl.load(second + N2 * N2 + square)
    real = tl.dot(left_real, right_real)
    real = tl.dot(-left_imaginary, right_imaginary, real)
    imaginary = tl.dot(left_real, right_imaginary)
    imaginary = tl.dot(left_imaginary, right_real, imaginary)
    return real, imaginary


@triton.jit
def back_along_rows(real, imaginary, back, second, N1: tl.constexpr, N2: tl.constexpr):
    """(P F2*) * conj(E) of P = real + i imaginary, in float16, and a number that it is to be
    multiplied by. `back` is conj(E)."""
    n1, n2 = tl.arange(0, N1), tl.arange(0, N2)
    n = n1[:, None] * N2 + n2[None, :]
    scale = largest(tl.maximum(tl.abs(real), tl.abs(imaginary)))
    left_real = (real * reciprocal(scale)).to(tl.float16)
    left_imaginary = (imaginary * reciprocal(scale)).to(tl.float16)
    square = n2[:, None] * N2 + n2[None, :]
    right_real, right_imaginary = tl.load(second + square), tl.load(second + N2 * N2 + square)
    real = tl.dot(left_real, right_real)
    real = tl.dot(left_imaginary, right_imaginary, real)
    imaginary = tl.dot(left_imaginary, right_real)
    imaginary = tl.dot(-left_real, right_imaginary, imaginary)
    by_real, by_imaginary = complex_at(back, n, N1 * N2)
    below_real = (real * by_real - imaginary * by_imaginary).to(tl.float16)
    below_imaginary = (real * by_imaginary + imaginary * by_real).to(tl.float16)
    return below_real, below_imaginary, scale


@triton.jit
def _spectrum(x, L, first, twiddle, second, N1: tl.constexpr, N2: tl.constexpr):
    """Real and imaginary parts of Z and a number that these are to be multiplied by."""
    n1 = tl.arange(0, N1)
    n = n1[:, None] * N2 + tl.arange(0, N2)[None, :]
    rows = tl.load(x + n, mask=n < L, other=0.0).to(tl.float32)
    scale = largest(tl.abs(rows))
    rows = (rows * reciprocal(scale)).to(tl.float16)
    square = n1[:, None] * N1 + n1[None, :]
    real = tl.dot(tl.load(first + square), rows)
    imaginary = tl.dot(tl.load(first + N1 * N1 + square), rows)
    real, imaginary = along_rows(real, imaginary, twiddle, second, N1, N2)
    return real, imaginary, scale


@triton.jit
def _signal(real, imaginary, first, back, second, N1: tl.constexpr, N2: tl.constexpr):
    """Re(conj(W) U* P) of P = real + i imaginary, and a number that it is to be multiplied by."""
    n1 = tl.arange(0, N1)
    below_real, below_imaginary, scale = back_along_rows(real, imaginary, back, second, N1, N2)
    # F1 transposed: Re(conj(f) b) is Re f Re b + Im f Im b.
    square = n1[None, :] * N1 + n1[:, None]
    signal = tl.dot(tl.load(first + square), below_real)
    signal = tl.dot(tl.load(first + N1 * N1 + square), below_imaginary, signal)
    return signal, scale


@triton.jit
def _filter(
    x, spectrum, spectrum_scale, y, first, twiddle, back, second, B, L,
    N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    # The programs of a channel run together, as they read the same spectrum.
    row = tl.program_id(0).to(tl.int64)
    channel = row // B
    n = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    real, imaginary, scale = _spectrum(x + row * L, L, first, twiddle, second, N1, N2)
    by_real, by_imaginary = complex_at(spectrum + channel * (2 * N1 * N2), n, N1 * N2)
    product = real * by_real - imaginary * by_imaginary
    imaginary = real * by_imaginary + imaginary * by_real
    signal, inner_scale = _signal(product, imaginary, first, back, second, N1, N2)
    signal = signal * inner_scale * scale * tl.load(spectrum_scale + channel)
    tl.store(y + row * L + n, signal.to(y.dtype.element_ty), mask=n < L)


@triton.jit
def _gradient_of_x(
    x, d_y, spectrum, spectrum_scale, d_x, products, product_scales,
    first, twiddle, back, second, B, L,
    N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """And, for that of the taps, the product of the spectra of d_y and of x, conjugate."""
    row = tl.program_id(0).to(tl.int64)
    channel = row // B
    n = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    real, imaginary, scale = _spectrum(d_y + row * L, L, first, twiddle, second, N1, N2)
    # It waits in memory: there is no room for a second one beside it.
    products += row * (2 * N1 * N2)
    tl.store(products + n, real.to(tl.float16))
    tl.store(products + N1 * N2 + n, imaginary.to(tl.float16))
    by_real, by_imaginary = complex_at(spectrum + channel * (2 * N1 * N2), n, N1 * N2)
    product = real * by_real + imaginary * by_imaginary
    imaginary = imaginary * by_real - real * by_imaginary
    signal, inner_scale = _signal(product, imaginary, first, back, second, N1, N2)
    signal = signal * inner_scale * scale * tl.load(spectrum_scale + channel)
    tl.store(d_x + row * L + n, signal.to(d_x.dtype.element_ty), mask=n < L)
    tl.debug_barrier()
    by_real, by_imaginary, x_scale = _spectrum(x + row * L, L, first, twiddle, second, N1, N2)
    real, imaginary = complex_at(products, n, N1 * N2)
    product = real * by_real + imaginary * by_imaginary
    imaginary = imaginary * by_real - real * by_imaginary
    inner_scale = largest(tl.maximum(tl.abs(product), tl.abs(imaginary)))
    tl.debug_barrier()
    tl.store(products + n, (product * reciprocal(inner_scale)).to(tl.float16))
    tl.store(products + N1 * N2 + n, (imaginary * reciprocal(inner_scale)).to(tl.float16))
    tl.store(product_scales + row, inner_scale * scale * x_scale)


@triton.jit
def _gradient_of_taps(
    products, product_scales, d_taps, first, back, second, B, L,
    N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    real = tl.zeros([N1, N2], tl.float32)
    imaginary = tl.zeros([N1, N2], tl.float32)
    for b in range(B):
        row = channel * B + b
        scale = tl.load(product_scales + row)
        of_real, of_imaginary = complex_at(products + row * (2 * N1 * N2), n, N1 * N2)
        real += of_real * scale
        imaginary += of_imaginary * scale
    signal, scale = _signal(real, imaginary, first, back, second, N1, N2)
    # The spectrum of x is that of a transform that keeps lengths, G is not.
    signal = signal * scale * tl.sqrt(tl.full([], N1 * N2, tl.float32))
    tl.store(d_taps + channel * L + n, signal, mask=n < L)


def forward(x: Tensor, spectrum: Tensor, scale: Tensor, tables: Tables) -> Tensor:
    """y [C, B, L] in the dtype of x [C, B, L], from G = scale [C] spectrum [C, 1, 2, N1, N2]."""
    C, B, L = x.shape
    y = torch.empty_like(x)
    sizes = {"N1": spectrum.shape[3], "N2": spectrum.shape[4]}
    _filter[(C * B,)](
        x, spectrum, scale, y, *_of_kernels(tables), B, L, **sizes, **options(**sizes)
    )  # fmt: skip
    return y


def backward(
    x: Tensor, spectrum: Tensor, scale: Tensor, d_y: Tensor, tables: Tables
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of the taps [C, L], in float32."""
    C, B, L = x.shape
    sizes = {"N1": spectrum.shape[3], "N2": spectrum.shape[4]}
    d_x = torch.empty_like(x)
    d_taps = torch.empty(C, L, device=x.device)
    products = torch.empty(C, B, *spectrum.shape[2:], dtype=torch.float16, device=x.device)
    product_scales = torch.empty(C, B, device=x.device)
    given = _of_kernels(tables)
    _gradient_of_x[(C * B,)](
        x, d_y, spectrum, scale, d_x, products, product_scales, *given, B, L, **sizes,
        **options(**sizes),
    )  # fmt: skip
    first, _, back, second = given
    _gradient_of_taps[(C,)](
        products, product_scales, d_taps, first, back, second, B, L, **sizes, **options(**sizes)
    )  # fmt: skip
    return d_x, d_taps


def _of_kernels(tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tables.first, tables.twiddle, tables.back, tables.second


def options(N1: int, N2: int) -> dict[str, int]:
    """Four warps for 64 rows, which multiply with whole rows of their own."""
    warps = {"num_warps": max(1, N1 // 16)}
    return warps | {"maxnreg": MAX_REGISTERS} if N1 * N2 <= TWO_PROGRAMS else warps
