"""Products with lower-triangular Toeplitz matrices that are never in memory: Triton kernels.

    y[c, n, t] = sum over s <= t of taps[c, t - s] x[c, n, s]

Time is in blocks of TILE positions, and block i of y is the sum over m <= i of M_m times block
i - m of x, where M_m holds the taps of lags around m TILE. A tile M_m is read from its 2 TILE - 1
taps, which costs as much as a small product: so one program multiplies it with many columns, a
column being one block of one sequence. The gradient of x takes the transposed tiles and blocks
that come later; that of the taps sums products of blocks m apart, then along their diagonals, in
one order, so that it is the same each time. Distances beyond the taps are left out.

Letters  C channels, B sequences, T time, K taps, N blocks of TILE positions, M blocks of TILE taps.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
MANY_COLUMNS, FEW_COLUMNS = (256, 8), (64, 4)
"""Columns of a program, blocks times sequences, and its warps: for long inputs, which use a tile of
the matrix as often as they can, and for short ones, of FEW_BLOCKS blocks at most."""
FEW_BLOCKS = 4
WIDE = 4
"""Neighbouring distances of a program of the taps' gradient: a block of d_y meets so many of x."""
INNER = 32
"""Columns that it sums over at a time."""
TAPS_WARPS = 4
TAPS_STAGES = 3
TAPS_REGISTERS = 168
"""Of a thread at most: three programs share a processor."""
TOGETHER = 8
"""Channels whose programs run together: x and d_y, which all of these read, stay in cache."""


@triton.jit
def _toeplitz_apply(
    x, taps, y, B, T, K, N, groups, parts,
    TRANSPOSED: tl.constexpr, TILE: tl.constexpr, SEQUENCES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # The programs of a channel run together, as they read the same inputs. Those that have most to
    # add up start first: they have the last blocks, or the first.
    channel = (tl.program_id(0) // (groups * parts)).to(tl.int64)
    within = tl.program_id(0) % (groups * parts)
    group = within // parts
    if not TRANSPOSED:
        group = groups - 1 - group
    row = tl.arange(0, TILE)
    column = tl.arange(0, BLOCKS * SEQUENCES)
    block = group * BLOCKS + column // SEQUENCES
    n = within % parts * SEQUENCES + column % SEQUENCES
    of_column = (channel * B + n) * T
    apart = row[:, None] - row[None, :]
    if TRANSPOSED:
        apart = -apart
        number = N - group * BLOCKS
    else:
        number = tl.minimum(group * BLOCKS + BLOCKS, N)
    number = tl.minimum(number, (K + TILE - 2) // TILE + 1)
    total = tl.zeros([TILE, BLOCKS * SEQUENCES], tl.float32)
    for m in range(number):
        lag = m * TILE + apart
        matrix = tl.load(taps + channel * K + lag, mask=(lag >= 0) & (lag < K), other=0.0)
        source = block + m if TRANSPOSED else block - m
        s = source[None, :] * TILE + row[:, None]
        inside = (s >= 0) & (s < T) & (n < B)[None, :]
        inputs = tl.load(x + of_column[None, :] + s, mask=inside, other=0.0)
        total = tl.dot(matrix, inputs, total, input_precision="ieee")
    t = block[None, :] * TILE + row[:, None]
    inside = (t < T) & (n < B)[None, :]
    tl.store(y + of_column[None, :] + t, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _toeplitz_d_taps(
    x, d_y, sums, C, B, T, N, M, TOGETHER,
    TILE: tl.constexpr, WIDE: tl.constexpr, SEQUENCES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The gradient of lag m TILE + q is sums[c, 0, m, q], of blocks of d_y and those of x that lie
    m before, plus sums[c, 1, m, q], of those that lie m + 1 before. Sums are zeros at first."""
    # A set of channels after another, and in it the programs that have most to add up first.
    groups = tl.cdiv(tl.minimum(M + 1, N), WIDE)
    first_channel = tl.program_id(0) // (TOGETHER * groups) * TOGETHER
    within = tl.program_id(0) - first_channel * groups
    together = tl.minimum(TOGETHER, C - first_channel)
    channel = (first_channel + within % together).to(tl.int64)
    nearest = within // together * WIDE
    row = tl.arange(0, TILE)
    wide = tl.arange(0, WIDE * TILE)
    column = tl.arange(0, BLOCKS * SEQUENCES)
    # A block of d_y meets WIDE blocks of x, the last of which lies `nearest` before it.
    behind = (nearest + WIDE - 1) * TILE
    d_y += channel * B * T
    x += channel * B * T - behind
    product = tl.zeros([TILE, WIDE * TILE], tl.float32)
    first_block, first_n = nearest, 0
    # One loop, without branches: of two the inner one alone would load ahead.
    for _ in range(tl.cdiv(N - nearest, BLOCKS) * tl.cdiv(B, SEQUENCES)):
        n = first_n + column % SEQUENCES
        start = (first_block + column // SEQUENCES) * TILE
        at = n * T + start
        inside = (start[None, :] + row[:, None] < T) & (n < B)[None, :]
        left = tl.load(d_y + (at[None, :] + row[:, None]), mask=inside, other=0.0)
        s = start[:, None] + wide[None, :] - behind
        inside = (s >= 0) & (s < T) & (n < B)[:, None]
        right = tl.load(x + (at[:, None] + wide[None, :]), mask=inside, other=0.0)
        product = tl.dot(left, right, product, input_precision="ieee")
        first_n += SEQUENCES
        first_block = tl.where(first_n < B, first_block, first_block + BLOCKS)
        first_n = tl.where(first_n < B, first_n, 0)
    # Row r of a tile, read from column r backwards: column q of the result is diagonal q, its
    # first q rows are of the diagonal that lies TILE above.
    product = tl.reshape(product, [TILE, WIDE, TILE])
    r, q = row[:, None, None], row[None, None, :]
    backwards = tl.broadcast_to((r - q + TILE) % TILE, [TILE, WIDE, TILE])
    diagonals = tl.gather(product, backwards, axis=2)
    own = tl.sum(tl.where(r >= q, diagonals, 0.0), axis=0)
    above = tl.sum(tl.where(r >= q, 0.0, diagonals), axis=0)
    m = nearest + WIDE - 1 - tl.arange(0, WIDE)[:, None]
    at = sums + (channel * 2 * M + m) * TILE + row[None, :]
    tl.store(at, own, mask=m < M)
    tl.store(at + (M - 1) * TILE, above, mask=(m >= 1) & (m <= M) & (m < N))


def forward(x: Tensor, taps: Tensor, *, transposed: bool = False) -> Tensor:
    """y [C, B, T] from x [C, B, T] and taps [C, K], K <= T, contiguous and of one dtype; by the
    transposed matrices if asked for."""
    C, B, T = x.shape
    y = torch.empty_like(x)
    num_blocks = int(triton.cdiv(T, TILE))
    most, num_warps = FEW_COLUMNS if num_blocks <= FEW_BLOCKS else MANY_COLUMNS
    sequences, blocks = _columns(B, num_blocks, most)
    groups, parts = int(triton.cdiv(num_blocks, blocks)), int(triton.cdiv(B, sequences))
    _toeplitz_apply[(C * groups * parts,)](
        x, taps, y, B, T, taps.shape[1], num_blocks, groups, parts, TRANSPOSED=transposed,
        TILE=TILE, SEQUENCES=sequences, BLOCKS=blocks, num_warps=num_warps,
    )  # fmt: skip
    return y


def backward(x: Tensor, taps: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its dtype, and of the taps, in float32."""
    return forward(d_y, taps, transposed=True), _taps_backward(x, d_y, taps.shape[1])


def _taps_backward(x: Tensor, d_y: Tensor, num_taps: int) -> Tensor:
    C, B, T = x.shape
    num_blocks = int(triton.cdiv(T, TILE))
    tap_blocks = int(triton.cdiv(num_taps, TILE))
    distances = min(tap_blocks + 1, num_blocks)
    wide = min(WIDE, int(triton.next_power_of_2(distances)))
    sequences, blocks = _columns(B, num_blocks, INNER)
    sums = torch.zeros(C, 2, tap_blocks * TILE, device=x.device)
    _toeplitz_d_taps[(C * int(triton.cdiv(distances, wide)),)](
        x, d_y, sums, C, B, T, num_blocks, tap_blocks, TOGETHER, TILE=TILE, WIDE=wide,
        SEQUENCES=sequences, BLOCKS=blocks, num_warps=TAPS_WARPS, num_stages=TAPS_STAGES,
        maxnreg=TAPS_REGISTERS if x.element_size() == 2 and T % 16 == 0 else None,
    )  # fmt: skip
    return sums.sum(1)[:, :num_taps].contiguous()


def _columns(num_sequences: int, num_blocks: int, most: int) -> tuple[int, int]:
    """Sequences and blocks of a program, powers of two: together `most` columns, or fewer where
    there are no more, but the 16 that tensor cores want."""
    sequences = min(most, int(triton.next_power_of_2(num_sequences)))
    blocks = min(most // sequences, int(triton.next_power_of_2(num_blocks)))
    return max(sequences, 16 // blocks), blocks
