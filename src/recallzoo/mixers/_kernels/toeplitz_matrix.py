"""Triangular Toeplitz matrices and the gradient of what they are made of: Triton kernels.

    matrix[c, s, t] = taps[c, t - s], zero where s > t       written once, in the dtype asked for
    d_taps[c, k]    = sum over s of d_matrix[c, s, s + k]    read once, summed in float32

Letters  C channels, T time.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows of a matrix that are in flight at once."""
MAX_COLUMNS = 256


@triton.jit
def _fill(taps, matrix, T, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    lag = t[None, :] - s[:, None]
    inside = (s < T)[:, None] & (t < T)[None, :]
    values = tl.load(taps + channel * T + lag, mask=inside & (lag >= 0), other=0.0)
    at = (channel * T + s[:, None]) * T + t[None, :]
    tl.store(matrix + at, values.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _sum_diagonals(
    d_matrix, d_taps, T, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    channel = tl.program_id(0).to(tl.int64)
    lag = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(BLOCKS):
        s = block * ROWS + tl.arange(0, ROWS)
        t = s[:, None] + lag[None, :]
        at = (channel * T + s[:, None]) * T + t
        inside = t < T
        total += tl.load(d_matrix + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_taps + channel * T + lag, tl.sum(total, axis=0), mask=lag < T)


def fill(taps: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, T, T] from taps [C, T]."""
    C, T = taps.shape
    matrix = torch.empty(C, T, T, dtype=dtype, device=taps.device)
    columns = _columns(T)
    grid = (C, int(triton.cdiv(T, ROWS)), int(triton.cdiv(T, columns)))
    _fill[grid](taps, matrix, T, ROWS=ROWS, COLUMNS=columns)
    return matrix


def sum_diagonals(d_matrix: Tensor) -> Tensor:
    """d_taps [C, T] in float32 from d_matrix [C, T, T]."""
    C, T, _ = d_matrix.shape
    d_taps = torch.empty(C, T, device=d_matrix.device)
    columns = _columns(T)
    grid = (C, int(triton.cdiv(T, columns)))
    blocks = int(triton.cdiv(T, ROWS))
    _sum_diagonals[grid](d_matrix, d_taps, T, BLOCKS=blocks, ROWS=ROWS, COLUMNS=columns)
    return d_taps


def _columns(seq_len: int) -> int:
    return min(MAX_COLUMNS, int(triton.next_power_of_2(seq_len)))
