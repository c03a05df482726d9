"""RWKV's mixtures of each token and the one before it: Triton kernels.

    out[m, t]  =  x[t-1] + mix[m] (x[t] - x[t-1]),                  m < M, M = 2 or 3, x[-1] = 0
    d_x[t]     =  sum over m of  mix[m] d_out[m, t] + (1 - mix[m]) d_out[m, t+1]
    d_mix[m]   =  sum over t of  d_out[m, t] (x[t] - x[t-1])

Each row is read once from memory and once more, as a neighbour, from the cache. Sums are in
float32; those of d_mix are one for each program, added up in one order.

Letters   G groups of N sequences with ratios of their own, T time, D width, M mixtures.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
BLOCK = 64
"""Positions and channels of a tile."""
TILES = 8
"""Tiles of one sequence whose share of d_mix one program sums."""


@triton.jit
def _shift_forward(
    x,
    mix,
    out0,
    out1,
    out2,
    STRIDE,
    N,
    T: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    tiles: tl.constexpr = (T + ROWS - 1) // ROWS
    program = tl.program_id(0)
    sequence = (program // (blocks * tiles)).to(tl.int64)
    group = sequence // N
    col = program % blocks * BLOCK + tl.arange(0, BLOCK)
    t = program // blocks % tiles * ROWS + tl.arange(0, ROWS)
    inside = (t < T)[:, None] & (col < D)[None, :]
    at = t[:, None] * D + col[None, :]
    row = x + sequence * T * D + at
    now = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(row - D, mask=inside & (t > 0)[:, None], other=0.0).to(tl.float32)
    place = group * STRIDE + sequence % N * T * D
    for m in tl.static_range(M):
        ratio = tl.load(mix + (group * M + m) * D + col, mask=col < D, other=0.0)
        mixed = before + (now - before) * ratio[None, :]
        out = out0 if m == 0 else (out1 if m == 1 else out2)
        tl.store(out + place + at, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _shift_backward(
    x,
    mix,
    d_out0,
    d_out1,
    d_out2,
    d_x,
    sums,
    STRIDE,
    N,
    T: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    parts: tl.constexpr = (T + ROWS * TILES - 1) // (ROWS * TILES)
    program = tl.program_id(0)
    sequence = (program // (blocks * parts)).to(tl.int64)
    group = sequence // N
    part = program // blocks % parts
    col = program % blocks * BLOCK + tl.arange(0, BLOCK)
    place = group * STRIDE + sequence % N * T * D
    total0 = tl.zeros([ROWS, BLOCK], tl.float32)
    total1 = tl.zeros([ROWS, BLOCK], tl.float32)
    total2 = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(TILES):
        t = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (t < T)[:, None] & (col < D)[None, :]
        at = t[:, None] * D + col[None, :]
        row = x + sequence * T * D + at
        now = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(row - D, mask=inside & (t > 0)[:, None], other=0.0).to(tl.float32)
        gradient = tl.zeros([ROWS, BLOCK], tl.float32)
        for m in tl.static_range(M):
            ratio = tl.load(mix + (group * M + m) * D + col, mask=col < D, other=0.0)[None, :]
            given = (d_out0 if m == 0 else (d_out1 if m == 1 else d_out2)) + place + at
            here = tl.load(given, mask=inside, other=0.0).to(tl.float32)
            follows = (t < T - 1)[:, None] & (col < D)[None, :]
            later = tl.load(given + D, mask=follows, other=0.0).to(tl.float32)
            gradient += ratio * here + (1.0 - ratio) * later
            if m == 0:
                total0 += here * (now - before)
            elif m == 1:
                total1 += here * (now - before)
            else:
                total2 += here * (now - before)
        to = d_x + sequence * T * D + at
        tl.store(to, gradient.to(d_x.dtype.element_ty), mask=inside)
    own = sums + (sequence * parts + part) * M * D + col
    tl.store(own, tl.sum(total0, axis=0), mask=col < D)
    tl.store(own + D, tl.sum(total1, axis=0), mask=col < D)
    if M == 3:
        tl.store(own + 2 * D, tl.sum(total2, axis=0), mask=col < D)


def forward(x: Tensor, mix: Tensor, outs: Sequence[Tensor]) -> None:
    """Fill the M outputs [G, N, T, D], of one stride between groups and dense within one, from x
    [G N, T, D] and mix [G, M, D] in float32."""
    sizes = _sizes(x, mix)
    tiles = triton.cdiv(sizes["T"], sizes["ROWS"]) * triton.cdiv(sizes["D"], sizes["BLOCK"])
    _shift_forward[(len(x) * int(tiles),)](x, mix, *_three(outs), outs[0].stride(0), **sizes)


def backward(x: Tensor, mix: Tensor, d_outs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of x and mix, from those of the outputs, laid out as in `forward`."""
    sizes = _sizes(x, mix)
    groups, num_mixtures, width = mix.shape
    tiles = min(TILES, int(triton.cdiv(sizes["T"], sizes["ROWS"])))
    parts = int(triton.cdiv(sizes["T"], sizes["ROWS"] * tiles))
    d_x = torch.empty_like(x)
    sums = torch.empty(groups, sizes["N"] * parts, num_mixtures, width, device=x.device)
    grid = (len(x) * parts * int(triton.cdiv(width, sizes["BLOCK"])),)
    _shift_backward[grid](
        x, mix, *_three(d_outs), d_x, sums, d_outs[0].stride(0), **sizes, TILES=tiles
    )
    return d_x, sums.sum(1)


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    # The kernel's third pointer stands idle where there are two.
    return [tensors[min(m, len(tensors) - 1)] for m in range(3)]


def _sizes(x: Tensor, mix: Tensor) -> dict[str, int]:
    num_sequences, seq_len, width = x.shape
    groups, num_mixtures, _ = mix.shape
    return {
        "N": num_sequences // groups,
        "T": seq_len,
        "D": width,
        "M": num_mixtures,
        "ROWS": min(ROWS, int(triton.next_power_of_2(seq_len))),
        "BLOCK": min(BLOCK, int(triton.next_power_of_2(width))),
    }
