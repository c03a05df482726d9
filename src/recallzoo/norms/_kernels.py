"""Layer norms of a residual stream, and the additions between them, in one pass: Triton kernels.

    forward    reads x (and y), writes s = x + y, t = s + norm(s; inner), n = norm(t; outer)
    backward   reads s and the gradients of t and n, writes the gradient of s

Statistics are computed anew in the backward pass, in float32, from rows that are in registers
anyway. A program takes blocks of rows in turn and keeps its own sums for the norms' weights, so
that these are written once a program and added up in one order.

Letters   G groups with weights of their own, N rows of a group, D width, P programs of a group.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 2048, 1024
"""Elements of a block of rows: 16 and 8 for each thread of 4 warps. The backward pass holds nine
tiles of that size in registers."""
MAX_PROGRAMS = 2048
"""Over all groups; enough to fill a GPU several times over."""


@triton.jit
def _statistics(row, inside, D: tl.constexpr, EPS: tl.constexpr):
    """The rows centred and scaled to variance one, zero outside, and what they were scaled by."""
    centred = tl.where(inside, row - tl.sum(row, axis=1)[:, None] / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + EPS)
    return centred * scale[:, None], scale


@triton.jit
def _norm_gradient(d_out, unit, scale, weight, D: tl.constexpr):
    """The gradient of a norm's input from that of its output."""
    g = d_out * weight[None, :]
    mean = tl.sum(g, axis=1)[:, None] / D
    along = tl.sum(g * unit, axis=1)[:, None] / D
    return (g - mean - unit * along) * scale[:, None]


@triton.jit
def _norms_forward(
    x,
    y,
    inner_weight,
    inner_bias,
    outer_weight,
    outer_bias,
    s_out,
    t_out,
    n_out,
    N,
    BLOCKS_EACH: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    real = col < D
    outer_w = tl.load(outer_weight + group * D + col, mask=real, other=0.0)[None, :]
    outer_b = tl.load(outer_bias + group * D + col, mask=real, other=0.0)[None, :]
    kind = n_out.dtype.element_ty
    for i in range(BLOCKS_EACH):
        block = tl.program_id(0) + i * tl.num_programs(0)
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < N)[:, None] & real[None, :]
        at = (group * N + row[:, None]) * D + col[None, :]
        stream = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            # Rounded as the stream would be where each sum is a tensor of its own.
            stream += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            stream = stream.to(kind).to(tl.float32)
            tl.store(s_out + at, stream.to(kind), mask=inside)
            inner_w = tl.load(inner_weight + group * D + col, mask=real, other=0.0)[None, :]
            inner_b = tl.load(inner_bias + group * D + col, mask=real, other=0.0)[None, :]
            unit, _ = _statistics(stream, inside, D, EPS)
            stream += (unit * inner_w + inner_b).to(kind).to(tl.float32)
            stream = stream.to(kind).to(tl.float32)
            tl.store(t_out + at, stream.to(kind), mask=inside)
        unit, _ = _statistics(stream, inside, D, EPS)
        tl.store(n_out + at, (unit * outer_w + outer_b).to(kind), mask=inside)


@triton.jit
def _norms_backward(
    s,
    inner_weight,
    inner_bias,
    outer_weight,
    d_t,
    d_n,
    d_s,
    sums,
    N,
    BLOCKS_EACH: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    real = col < D
    outer_w = tl.load(outer_weight + group * D + col, mask=real, other=0.0)
    kind = d_s.dtype.element_ty
    d_outer_weight = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_outer_bias = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_inner_weight = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_inner_bias = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(BLOCKS_EACH):
        block = tl.program_id(0) + i * tl.num_programs(0)
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < N)[:, None] & real[None, :]
        at = (group * N + row[:, None]) * D + col[None, :]
        stream = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
        g_n = tl.load(d_n + at, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            inner_w = tl.load(inner_weight + group * D + col, mask=real, other=0.0)
            inner_b = tl.load(inner_bias + group * D + col, mask=real, other=0.0)
            inner_unit, inner_scale = _statistics(stream, inside, D, EPS)
            stream += (inner_unit * inner_w[None, :] + inner_b[None, :]).to(kind).to(tl.float32)
            stream = stream.to(kind).to(tl.float32)
        unit, scale = _statistics(stream, inside, D, EPS)
        d_outer_weight += g_n * unit
        d_outer_bias += g_n
        g = _norm_gradient(g_n, unit, scale, outer_w, D)
        if ADDS:
            g += tl.load(d_t + at, mask=inside, other=0.0).to(tl.float32)
            d_inner_weight += g * inner_unit
            d_inner_bias += g
            g += _norm_gradient(g, inner_unit, inner_scale, inner_w, D)
        tl.store(d_s + at, g.to(kind), mask=inside)
    # In the order inner weight, inner bias, outer weight, outer bias.
    base = sums + ((group * tl.num_programs(0) + tl.program_id(0)) * 4) * D + col
    if ADDS:
        tl.store(base, tl.sum(d_inner_weight, axis=0), mask=real)
        tl.store(base + D, tl.sum(d_inner_bias, axis=0), mask=real)
    tl.store(base + 2 * D, tl.sum(d_outer_weight, axis=0), mask=real)
    tl.store(base + 3 * D, tl.sum(d_outer_bias, axis=0), mask=real)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(x) for x [G, N, D] with weight and bias [G, D] in float32; in the dtype of x."""
    n = torch.empty_like(x)
    grid, each, shape = _launch(x, FORWARD_ELEMENTS)
    _norms_forward[grid](
        x,
        x,
        weight,
        bias,
        weight,
        bias,
        n,
        n,
        n,
        x.shape[1],
        each,
        EPS=eps,
        ADDS=False,
        **shape,
    )
    return n


def add_norms(
    x: Tensor,
    y: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    outer_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """s, t and n, each [G, N, D] as x and y are; weights and biases are [G, D]."""
    s, t, n = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    weights = (inner_weight, inner_bias, outer_weight, outer_bias)
    grid, each, shape = _launch(x, FORWARD_ELEMENTS)
    _norms_forward[grid](x, y, *weights, s, t, n, x.shape[1], each, EPS=eps, ADDS=True, **shape)
    return s, t, n


def norm_gradients(x: Tensor, d_n: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradient of x, and [G, 4, D], whose last two rows are those of weight and bias."""
    return _gradients(x, d_n, d_n, weight, weight, weight, eps, adds=False)


def add_norms_gradients(
    s: Tensor,
    d_t: Tensor,
    d_n: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of s, and [G, 4, D]: inner weight and bias, outer weight and bias."""
    return _gradients(s, d_t, d_n, inner_weight, inner_bias, outer_weight, eps, adds=True)


def _gradients(
    s: Tensor,
    d_t: Tensor,
    d_n: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    eps: float,
    *,
    adds: bool,
) -> tuple[Tensor, Tensor]:
    groups, num_rows, width = s.shape
    grid, each, shape = _launch(s, BACKWARD_ELEMENTS)
    d_s = torch.empty_like(s)
    sums = torch.empty(groups, grid[0], 4, width, device=s.device)
    weights = (inner_weight, inner_bias, outer_weight)
    _norms_backward[grid](
        s, *weights, d_t, d_n, d_s, sums, num_rows, each, EPS=eps, ADDS=adds, **shape
    )
    return d_s, sums.sum(1)


def _launch(x: Tensor, block_elements: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    groups, num_rows, width = x.shape
    block_d = int(triton.next_power_of_2(width))
    block_n = max(1, block_elements // block_d)
    num_blocks = int(triton.cdiv(num_rows, block_n))
    programs = max(1, min(num_blocks, MAX_PROGRAMS // groups))
    shape = {"D": width, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": 4}
    return (programs, groups), int(triton.cdiv(num_blocks, programs)), shape
