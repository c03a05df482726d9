"""Products with lower-triangular Toeplitz matrices that are never in memory: Triton kernels.

    y[c, n, t] = sum over s <= t of taps[c, t - s] x[c, n, s]

A tile of the matrix is read from the 2 TILE - 1 taps that it is made of and multiplied by a tile of
inputs on tensor cores, in float32 sums. So a convolution reads its input and writes its output
once, and costs B T^2 / 2 multiplications a channel.

The taps' gradient sums B T / TILE products of tiles for each distance of blocks, then along their
diagonals; in one order, so that it is the same each time.

Letters  C channels, B sequences, T time, N blocks of TILE positions.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
MOST_SEQUENCES = 64
"""Sequences that one program takes at most."""


@triton.jit
def _apply(x, taps, y, B, T, TILE: tl.constexpr, SEQUENCES: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64)
    # The last blocks look back furthest: they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tl.arange(0, TILE)
    n = tl.program_id(2) * SEQUENCES + tl.arange(0, SEQUENCES)
    apart = row[:, None] - row[None, :]
    total = tl.zeros([TILE, SEQUENCES], tl.float32)
    for j in range(block + 1):
        lag = (block - j) * TILE + apart
        matrix = tl.load(taps + channel * T + lag, mask=(lag >= 0) & (lag < T), other=0.0)
        s = j * TILE + row
        inside = (s < T)[:, None] & (n < B)[None, :]
        inputs = tl.load(x + (channel * B + n[None, :]) * T + s[:, None], mask=inside, other=0.0)
        total = tl.dot(matrix, inputs, total, input_precision="ieee")
    t = block * TILE + row
    inside = (t < T)[:, None] & (n < B)[None, :]
    at = (channel * B + n[None, :]) * T + t[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _products(x, d_y, products, B, T, N, TILE: tl.constexpr, SEQUENCES: tl.constexpr):
    """products[c, m, r, q] = sum over n, i of d_y[c, n, i TILE + r] x[c, n, (i - m) TILE + q]"""
    channel, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, TILE)
    sequence = tl.arange(0, SEQUENCES)
    total = tl.zeros([TILE, TILE], tl.float32)
    for i in range(m, N):
        t, s = i * TILE + row, (i - m) * TILE + row
        for start in range(0, B, SEQUENCES):
            n = start + sequence
            inside = (t < T)[:, None] & (n < B)[None, :]
            at = (channel * B + n[None, :]) * T + t[:, None]
            left = tl.load(d_y + at, mask=inside, other=0.0)
            inside = (n < B)[:, None] & (s < T)[None, :]
            at = (channel * B + n[:, None]) * T + s[None, :]
            right = tl.load(x + at, mask=inside, other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
    at = ((channel * N + m) * TILE + row[:, None]) * TILE + row[None, :]
    tl.store(products + at, total)


@triton.jit
def _along_diagonals(products, d_taps, T, N, TILE: tl.constexpr):
    """Lag m TILE + q: diagonal q of product m, and diagonal q - TILE of the one after it."""
    channel, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q = tl.arange(0, TILE)
    here = (channel * N + m) * TILE * TILE
    total = tl.zeros([TILE], tl.float32)
    for r in range(TILE):
        at = here + r * TILE + r - q
        total += tl.load(products + at, mask=q <= r, other=0.0)
        # One product further on, TILE columns to the right.
        follows = (q > r) & (m + 1 < N)
        total += tl.load(products + at + TILE * TILE + TILE, mask=follows, other=0.0)
    lag = m * TILE + q
    tl.store(d_taps + channel * T + lag, total, mask=lag < T)


def forward(x: Tensor, taps: Tensor) -> Tensor:
    """y [C, B, T] from x [C, B, T] and taps [C, T], contiguous and of one dtype."""
    C, B, T = x.shape
    y = torch.empty_like(x)
    sequences = _sequences(B)
    grid = (C, int(triton.cdiv(T, TILE)), int(triton.cdiv(B, sequences)))
    _apply[grid](x, taps, y, B, T, TILE=TILE, SEQUENCES=sequences)
    return y


def backward(x: Tensor, taps: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and taps."""
    C, B, T = x.shape
    # The transposed matrix is the same one with time running backwards.
    d_x = forward(d_y.flip(-1), taps).flip(-1)
    num_blocks = int(triton.cdiv(T, TILE))
    products = torch.empty(C, num_blocks, TILE, TILE, device=x.device)
    d_taps = torch.empty(C, T, device=x.device)
    grid = (C, num_blocks)
    _products[grid](x, d_y, products, B, T, num_blocks, TILE=TILE, SEQUENCES=_sequences(B))
    _along_diagonals[grid](products, d_taps, T, num_blocks, TILE=TILE)
    return d_x, d_taps.to(taps.dtype)


def _sequences(number: int) -> int:
    # Products on tensor cores are of 16 columns at least.
    return max(16, min(MOST_SEQUENCES, int(triton.next_power_of_2(number))))
