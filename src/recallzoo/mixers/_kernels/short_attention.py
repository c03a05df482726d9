"""Causal softmax attention with dropout, from packed projections: Triton kernels.

    forward    a block of queries walks over earlier blocks of keys with a running maximum and sum
    d_q        the same walk, the weights computed anew from their normaliser
    d_k, d_v   a block of keys walks over later blocks of queries

Queries, keys and values are read where one projection put them, [N, T, 3, H, K], its bias is added
there, and their gradients are written there, so nothing is split, transposed or joined. A weight
is dropped where the hash of its index says so, as in `recallzoo.random.dropout`; the T by T weights
are never stored.

Letters  N sequences, T time, H heads, K head width, G groups of N / G sequences with a key of
         their own.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mix32(x):
    """lowbias32 of the bits of an int32."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _kept(low, high, threshold, matrix, t, s, T: tl.constexpr):
    """Which weights of a block stay: bits of index, compared without sign."""
    index = (matrix * T + t[:, None]) * T + s[None, :]
    bits = _mix32(_mix32(index + low) ^ high)
    return (bits ^ -2147483648) >= threshold


@triton.jit
def _rows(pointer, row, col, stride, T: tl.constexpr, K: tl.constexpr):
    """Rows of a matrix whose rows are `stride` apart, zero beyond its edges."""
    inside = (row < T)[:, None] & (col < K)[None, :]
    return tl.load(pointer + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def _biased(pointer, bias, row, col, stride, T: tl.constexpr, K: tl.constexpr):
    """Such rows plus a bias, rounded as the projection would be."""
    rows = _rows(pointer, row, col, stride, T, K)
    b = tl.load(bias + col, mask=col < K, other=0.0).to(tl.float32)
    return (rows.to(tl.float32) + b[None, :]).to(rows.dtype)


@triton.jit
def _store(pointer, block, row, col, stride, T: tl.constexpr, K: tl.constexpr):
    inside = (row < T)[:, None] & (col < K)[None, :]
    at = pointer + row[:, None] * stride + col[None, :]
    tl.store(at, block.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    qkv,
    bias,
    y,
    normalizers,
    lows,
    highs,
    per_group,
    scale,
    threshold,
    keep_scale,
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    group = sequence // per_group
    low, high = tl.load(lows + group), tl.load(highs + group)
    matrix = (sequence - group * per_group) * H + head
    bias += (group * 3 * H + head) * K
    col = tl.arange(0, BLOCK_K)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = qkv + (sequence.to(tl.int64) * T * 3 * H + head) * K
    q = _biased(base, bias, t, col, 3 * H * K, T, K)
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for block in range(tl.program_id(0) + 1):
        s = block * BLOCK + tl.arange(0, BLOCK)
        k = _biased(base + H * K, bias + H * K, s, col, 3 * H * K, T, K)
        v = _biased(base + 2 * H * K, bias + 2 * H * K, s, col, 3 * H * K, T, K)
        scores = tl.dot(q, tl.trans(k)) * scale
        visible = (s[None, :] <= t[:, None]) & (s < T)[None, :]
        scores = tl.where(visible, scores, -1e30)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.where(visible, tl.exp(scores - new_largest[:, None]), 0.0)
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        if DROPS:
            kept = _kept(low, high, threshold, matrix, t, s, T)
            weights = tl.where(kept, weights * keep_scale, 0.0)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        largest = new_largest
    out = y + (sequence.to(tl.int64) * T * H + head) * K
    _store(out, sums / total[:, None], t, col, H * K, T, K)
    at = normalizers + tl.program_id(1) * T + t
    tl.store(at, largest + tl.log(total), mask=t < T)


@triton.jit
def _d_query(
    qkv,
    bias,
    y,
    normalizers,
    d_y,
    d_qkv,
    alongs,
    lows,
    highs,
    per_group,
    scale,
    threshold,
    keep_scale,
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    group = sequence // per_group
    low, high = tl.load(lows + group), tl.load(highs + group)
    matrix = (sequence - group * per_group) * H + head
    bias += (group * 3 * H + head) * K
    col = tl.arange(0, BLOCK_K)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = (sequence.to(tl.int64) * T * 3 * H + head) * K
    base = qkv + offset
    out_offset = (sequence.to(tl.int64) * T * H + head) * K
    q = _biased(base, bias, t, col, 3 * H * K, T, K)
    g = _rows(d_y + out_offset, t, col, H * K, T, K)
    out = _rows(y + out_offset, t, col, H * K, T, K)
    along = tl.sum(g.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(alongs + tl.program_id(1) * T + t, along, mask=t < T)
    normalizer = tl.load(normalizers + tl.program_id(1) * T + t, mask=t < T, other=0.0)
    d_q = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for block in range(tl.program_id(0) + 1):
        s = block * BLOCK + tl.arange(0, BLOCK)
        k = _biased(base + H * K, bias + H * K, s, col, 3 * H * K, T, K)
        v = _biased(base + 2 * H * K, bias + 2 * H * K, s, col, 3 * H * K, T, K)
        scores = tl.dot(q, tl.trans(k)) * scale
        visible = (s[None, :] <= t[:, None]) & (s < T)[None, :]
        weights = tl.where(visible, tl.exp(scores - normalizer[:, None]), 0.0)
        d_weights = tl.dot(g, tl.trans(v))
        if DROPS:
            kept = _kept(low, high, threshold, matrix, t, s, T)
            d_weights = tl.where(kept, d_weights * keep_scale, 0.0)
        d_scores = weights * (d_weights - along[:, None]) * scale
        d_q += tl.dot(d_scores.to(k.dtype), k)
    _store(d_qkv + offset, d_q, t, col, 3 * H * K, T, K)


@triton.jit
def _d_key_value(
    qkv,
    bias,
    normalizers,
    d_y,
    d_qkv,
    alongs,
    lows,
    highs,
    per_group,
    scale,
    threshold,
    keep_scale,
    T: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    group = sequence // per_group
    low, high = tl.load(lows + group), tl.load(highs + group)
    matrix = (sequence - group * per_group) * H + head
    bias += (group * 3 * H + head) * K
    col = tl.arange(0, BLOCK_K)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = (sequence.to(tl.int64) * T * 3 * H + head) * K
    base = qkv + offset
    out_offset = (sequence.to(tl.int64) * T * H + head) * K
    k = _biased(base + H * K, bias + H * K, s, col, 3 * H * K, T, K)
    v = _biased(base + 2 * H * K, bias + 2 * H * K, s, col, 3 * H * K, T, K)
    d_k = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    d_v = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for block in range(tl.program_id(0), (T + BLOCK - 1) // BLOCK):
        t = block * BLOCK + tl.arange(0, BLOCK)
        q = _biased(base, bias, t, col, 3 * H * K, T, K)
        g = _rows(d_y + out_offset, t, col, H * K, T, K)
        at = tl.program_id(1) * T + t
        normalizer = tl.load(normalizers + at, mask=t < T, other=0.0)
        along = tl.load(alongs + at, mask=t < T, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        visible = (s[None, :] <= t[:, None]) & (t < T)[:, None]
        weights = tl.where(visible, tl.exp(scores - normalizer[:, None]), 0.0)
        d_weights = tl.dot(g, tl.trans(v))
        dropped = weights
        if DROPS:
            kept = _kept(low, high, threshold, matrix, t, s, T)
            d_weights = tl.where(kept, d_weights * keep_scale, 0.0)
            dropped = tl.where(kept, weights * keep_scale, 0.0)
        d_v += tl.dot(tl.trans(dropped.to(g.dtype)), g)
        d_scores = weights * (d_weights - along[:, None]) * scale
        d_k += tl.dot(tl.trans(d_scores.to(q.dtype)), q)
    _store(d_qkv + offset + H * K, d_k, s, col, 3 * H * K, T, K)
    _store(d_qkv + offset + 2 * H * K, d_v, s, col, 3 * H * K, T, K)


def forward(
    qkv: Tensor, bias: Tensor, lows: Tensor, highs: Tensor, num_heads: int, rate: float
) -> tuple[Tensor, Tensor]:
    """y [N, T, H K] and the normaliser of every query, [N, H, T], from qkv [N, T, 3 H K]
    without its bias, [G, 3 H K]."""
    N, T, packed = qkv.shape
    y = torch.empty(N, T, packed // 3, dtype=qkv.dtype, device=qkv.device)
    normalizers = torch.empty(N, num_heads, T, device=qkv.device)
    grid, numbers, options = _launch(qkv, lows, num_heads, rate)
    _forward[grid](qkv, bias, y, normalizers, lows, highs, *numbers, **options)
    return y, normalizers


def backward(
    qkv: Tensor,
    bias: Tensor,
    y: Tensor,
    normalizers: Tensor,
    d_y: Tensor,
    lows: Tensor,
    highs: Tensor,
    num_heads: int,
    rate: float,
) -> Tensor:
    """The gradient of qkv."""
    d_qkv = torch.empty_like(qkv)
    alongs = torch.empty_like(normalizers)
    grid, numbers, options = _launch(qkv, lows, num_heads, rate)
    keys = (lows, highs)
    _d_query[grid](qkv, bias, y, normalizers, d_y, d_qkv, alongs, *keys, *numbers, **options)
    _d_key_value[grid](qkv, bias, normalizers, d_y, d_qkv, alongs, *keys, *numbers, **options)
    return d_qkv


def _launch(
    qkv: Tensor, lows: Tensor, num_heads: int, rate: float
) -> tuple[tuple[int, int], tuple[float, ...], dict[str, int]]:
    N, T, packed = qkv.shape
    head_dim = packed // 3 // num_heads
    block = max(16, min(64, int(triton.next_power_of_2(T))))
    block_k = max(16, int(triton.next_power_of_2(head_dim)))
    threshold = int(rate * 2**32) - 0x80000000
    numbers = (N // len(lows), head_dim**-0.5, threshold, 1.0 / (1.0 - rate))
    options = {"T": T, "H": num_heads, "K": head_dim, "DROPS": rate > 0.0, "BLOCK": block}
    options |= {"BLOCK_K": block_k, "num_warps": 8 if block_k > 64 else 4}
    return (int(triton.cdiv(T, block)), N * num_heads), numbers, options
