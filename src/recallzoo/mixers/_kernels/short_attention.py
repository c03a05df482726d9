"""Causal softmax attention with dropout, from packed projections: Triton kernels.

    forward    a block of queries walks over earlier blocks of keys with a running maximum and sum
    d_q        the same walk, the weights computed anew from their normaliser
    d_k, d_v   a block of keys walks over later blocks of queries

Queries, keys and values are read where one projection put them, [N, T, 3, H, K], and their
gradients are written there, so nothing is split, transposed or joined. What a walk reads goes into
its products as it is, without a stop in registers, so the bias is not added to it:

    queries   outside of the walk; d_q leaves them with their bias for d_k, d_v
    keys      not at all: it adds one number to all scores of a query, which softmax takes away,
              and the gradients of a query's scores sum to zero
    values    once to the sum, times the weights that were kept; its part of d_y . v likewise

A weight is dropped where the hash of its index says so, as in `recallzoo.random.dropout`; the T by
T weights are never stored.

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
def _rows(pointer, row, col, stride, T: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a matrix whose rows are `stride` apart, zero beyond its edges. WHOLE: blocks have
    none beyond."""
    at = pointer + row[:, None] * stride + col[None, :]
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=(row < T)[:, None] & (col < K)[None, :], other=0.0)


@triton.jit
def _bias(pointer, col, K: tl.constexpr):
    return tl.load(pointer + col, mask=col < K, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, block, row, col, stride, T: tl.constexpr, K: tl.constexpr):
    inside = (row < T)[:, None] & (col < K)[None, :]
    at = pointer + row[:, None] * stride + col[None, :]
    tl.store(at, block.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _attention_forward(
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
    WHOLE: tl.constexpr,
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
    q = _rows(base, t, col, 3 * H * K, T, K, WHOLE)
    q = (q.to(tl.float32) + _bias(bias, col, K)[None, :]).to(q.dtype)
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    kept_total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for block in range(tl.program_id(0) + 1):
        s = block * BLOCK + tl.arange(0, BLOCK)
        k = _rows(base + H * K, s, col, 3 * H * K, T, K, WHOLE)
        v = _rows(base + 2 * H * K, s, col, 3 * H * K, T, K, WHOLE)
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
        kept_total = kept_total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        largest = new_largest
    sums += kept_total[:, None] * _bias(bias + 2 * H * K, col, K)[None, :]
    out = y + (sequence.to(tl.int64) * T * H + head) * K
    _store(out, sums / total[:, None], t, col, H * K, T, K)
    at = normalizers + tl.program_id(1) * T + t
    tl.store(at, largest + tl.log(total), mask=t < T)


@triton.jit
def _attention_d_query(
    qkv,
    bias,
    y,
    normalizers,
    d_y,
    d_qkv,
    queries,
    alongs,
    of_biases,
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
    WHOLE: tl.constexpr,
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
    q = _rows(base, t, col, 3 * H * K, T, K, WHOLE)
    q = (q.to(tl.float32) + _bias(bias, col, K)[None, :]).to(q.dtype)
    _store(queries + out_offset, q, t, col, H * K, T, K)
    g = _rows(d_y + out_offset, t, col, H * K, T, K, WHOLE)
    out = _rows(y + out_offset, t, col, H * K, T, K, WHOLE)
    along = tl.sum(g.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(alongs + tl.program_id(1) * T + t, along, mask=t < T)
    of_bias = tl.sum(g.to(tl.float32) * _bias(bias + 2 * H * K, col, K)[None, :], axis=1)
    tl.store(of_biases + tl.program_id(1) * T + t, of_bias, mask=t < T)
    normalizer = tl.load(normalizers + tl.program_id(1) * T + t, mask=t < T, other=0.0)
    d_q = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for block in range(tl.program_id(0) + 1):
        s = block * BLOCK + tl.arange(0, BLOCK)
        k = _rows(base + H * K, s, col, 3 * H * K, T, K, WHOLE)
        v = _rows(base + 2 * H * K, s, col, 3 * H * K, T, K, WHOLE)
        scores = tl.dot(q, tl.trans(k)) * scale
        visible = (s[None, :] <= t[:, None]) & (s < T)[None, :]
        weights = tl.where(visible, tl.exp(scores - normalizer[:, None]), 0.0)
        d_weights = tl.dot(g, tl.trans(v)) + of_bias[:, None]
        if DROPS:
            kept = _kept(low, high, threshold, matrix, t, s, T)
            d_weights = tl.where(kept, d_weights * keep_scale, 0.0)
        d_scores = weights * (d_weights - along[:, None]) * scale
        d_q += tl.dot(d_scores.to(k.dtype), k)
    _store(d_qkv + offset, d_q, t, col, 3 * H * K, T, K)


@triton.jit
def _attention_d_key_value(
    qkv,
    normalizers,
    d_y,
    d_qkv,
    queries,
    alongs,
    of_biases,
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
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    group = sequence // per_group
    low, high = tl.load(lows + group), tl.load(highs + group)
    matrix = (sequence - group * per_group) * H + head
    col = tl.arange(0, BLOCK_K)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = (sequence.to(tl.int64) * T * 3 * H + head) * K
    base = qkv + offset
    out_offset = (sequence.to(tl.int64) * T * H + head) * K
    k = _rows(base + H * K, s, col, 3 * H * K, T, K, WHOLE)
    v = _rows(base + 2 * H * K, s, col, 3 * H * K, T, K, WHOLE)
    d_k = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    d_v = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for block in range(tl.program_id(0), (T + BLOCK - 1) // BLOCK):
        t = block * BLOCK + tl.arange(0, BLOCK)
        q = _rows(queries + out_offset, t, col, H * K, T, K, WHOLE)
        g = _rows(d_y + out_offset, t, col, H * K, T, K, WHOLE)
        at = tl.program_id(1) * T + t
        normalizer = tl.load(normalizers + at, mask=t < T, other=0.0)
        along = tl.load(alongs + at, mask=t < T, other=0.0)
        of_bias = tl.load(of_biases + at, mask=t < T, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        visible = (s[None, :] <= t[:, None]) & (t < T)[:, None]
        weights = tl.where(visible, tl.exp(scores - normalizer[:, None]), 0.0)
        d_weights = tl.dot(g, tl.trans(v)) + of_bias[:, None]
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
    _attention_forward[grid](qkv, bias, y, normalizers, lows, highs, *numbers, **options)
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
    d_qkv, queries = torch.empty_like(qkv), torch.empty_like(y)
    handed_on = queries, torch.empty_like(normalizers), torch.empty_like(normalizers)
    grid, numbers, options = _launch(qkv, lows, num_heads, rate)
    rest = d_y, d_qkv, *handed_on, lows, highs, *numbers
    _attention_d_query[grid](qkv, bias, y, normalizers, *rest, **options)
    _attention_d_key_value[grid](qkv, normalizers, *rest, **options)
    return d_qkv


def tile_of(seq_len: int, block_k: int) -> dict[str, int]:
    """Rows of a block, and options of the compiler."""
    block = max(16, min(64, int(triton.next_power_of_2(seq_len))))
    # Two blocks ahead at most: a third costs shared memory, and so a block that runs beside.
    return {"BLOCK": block, "num_warps": 8 if block_k > 64 else 4, "num_stages": 2}


def _launch(
    qkv: Tensor, lows: Tensor, num_heads: int, rate: float
) -> tuple[tuple[int, int], tuple[float, ...], dict[str, int]]:
    N, T, packed = qkv.shape
    head_dim = packed // 3 // num_heads
    block_k = max(16, int(triton.next_power_of_2(head_dim)))
    tile = tile_of(T, block_k)
    threshold = int(rate * 2**32) - 0x80000000
    numbers = (N // len(lows), head_dim**-0.5, threshold, 1.0 / (1.0 - rate))
    options = {"T": T, "H": num_heads, "K": head_dim, "DROPS": rate > 0.0, "BLOCK_K": block_k}
    options["WHOLE"] = T % tile["BLOCK"] == 0 and head_dim == block_k
    return (int(triton.cdiv(T, tile["BLOCK"])), N * num_heads), numbers, options | tile
