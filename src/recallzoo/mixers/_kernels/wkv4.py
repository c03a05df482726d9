"""RWKV-4's weighted mean as a scan in registers: Triton kernels.

A program keeps the sums of one sequence and a block of channels, and reads each key and value
once. The backward pass runs the scan again, keeps 1 / denominator, output and exponent of each
position, then runs back in time with

    G[t-1] = g[t] / den[t] (1, -y[t]) + e^-w G[t]

Every sum carries its largest exponent, as in `rwkv4._decayed_sums`.

Letters   N sequences, T time, D width, G groups of sequences with weights of their own.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    k, v, decay, first, y, T: tl.constexpr, D: tl.constexpr, PER_GROUP, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    w = tl.load(decay + sequence // PER_GROUP * D + col, mask=inside, other=0.0)
    u = tl.load(first + sequence // PER_GROUP * D + col, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    exponent = tl.full([BLOCK], -1e38, tl.float32)
    for t in range(T):
        at = (sequence * T + t) * D + col
        key = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(exponent, key + u)
        past, now = tl.exp(exponent - largest), tl.exp(key + u - largest)
        out = (past * total + now * value) / (past * weight + now)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
        largest = tl.maximum(exponent - w, key)
        past, now = tl.exp(exponent - w - largest), tl.exp(key - largest)
        total = past * total + now * value
        weight = past * weight + now
        exponent = largest


@triton.jit
def _backward(
    k,
    v,
    decay,
    first,
    d_y,
    scratch,
    d_k,
    d_v,
    d_decay,
    d_first,
    T: tl.constexpr,
    D: tl.constexpr,
    PER_GROUP,
    SIZE,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    w = tl.load(decay + sequence // PER_GROUP * D + col, mask=inside, other=0.0)
    u = tl.load(first + sequence // PER_GROUP * D + col, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    slope_total = tl.zeros([BLOCK], tl.float32)
    slope_weight = tl.zeros([BLOCK], tl.float32)
    exponent = tl.full([BLOCK], -1e38, tl.float32)
    sum_decay = tl.zeros([BLOCK], tl.float32)
    sum_first = tl.zeros([BLOCK], tl.float32)
    for t in range(T):
        at = (sequence * T + t) * D + col
        key = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(d_y + at, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(exponent, key + u)
        past, now = tl.exp(exponent - largest), tl.exp(key + u - largest)
        share = past * weight + now
        out = (past * total + now * value) / share
        scaled = given / share
        tl.store(scratch + at, scaled, mask=inside)
        tl.store(scratch + SIZE + at, out, mask=inside)
        tl.store(scratch + 2 * SIZE + at, largest, mask=inside)
        sum_first += now * scaled * (value - out)
        sum_decay += past * scaled * (slope_total - out * slope_weight)
        largest = tl.maximum(exponent - w, key)
        past, now = tl.exp(exponent - w - largest), tl.exp(key - largest)
        slope_total = past * (slope_total - total)
        slope_weight = past * (slope_weight - weight)
        total = past * total + now * value
        weight = past * weight + now
        exponent = largest
    tl.store(d_decay + sequence * D + col, sum_decay, mask=inside)
    tl.store(d_first + sequence * D + col, sum_first, mask=inside)
    g_total = tl.zeros([BLOCK], tl.float32)
    g_weight = tl.zeros([BLOCK], tl.float32)
    exponent = tl.full([BLOCK], -1e38, tl.float32)
    for back in range(T):
        at = (sequence * T + T - 1 - back) * D + col
        key = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.load(scratch + at, mask=inside, other=0.0)
        out = tl.load(scratch + SIZE + at, mask=inside, other=0.0)
        largest = tl.load(scratch + 2 * SIZE + at, mask=inside, other=0.0)
        now = tl.exp(key + u - largest) * scaled
        later = tl.exp(key + exponent)
        key_gradient = now * (value - out) + later * (g_total * value + g_weight)
        tl.store(d_k + at, key_gradient.to(d_k.dtype.element_ty), mask=inside)
        value_gradient = now + later * g_total
        tl.store(d_v + at, value_gradient.to(d_v.dtype.element_ty), mask=inside)
        common = tl.maximum(exponent - w, -largest)
        keep, add = tl.exp(exponent - w - common), tl.exp(-largest - common) * scaled
        g_total = keep * g_total + add
        g_weight = keep * g_weight - add * out
        exponent = common


def forward(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """y [N, T, D] in the dtype of v, from k and v [N, T, D], decay and first [G, D] in float32."""
    num_sequences, seq_len, width = k.shape
    y = torch.empty_like(v)
    grid, block = _launch(num_sequences, width)
    per_group = num_sequences // len(decay)
    _forward[grid](k, v, decay, first, y, seq_len, width, per_group, **block)
    return y


def backward(
    k: Tensor, v: Tensor, decay: Tensor, first: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, decay and first."""
    num_sequences, seq_len, width = k.shape
    scratch = torch.empty(3, *k.shape, device=k.device)
    sums = torch.empty(2, num_sequences, width, device=k.device)
    d_k, d_v = torch.empty_like(k), torch.empty_like(v)
    grid, block = _launch(num_sequences, width)
    per_group = num_sequences // len(decay)
    _backward[grid](
        *(k, v, decay, first, d_y, scratch, d_k, d_v, sums[0], sums[1]),
        *(seq_len, width, per_group, k.numel()),
        **block,
    )
    by_group = sums.unflatten(1, (len(decay), per_group))
    return d_k, d_v, by_group[0].sum(1), by_group[1].sum(1)


def _launch(num_sequences: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(64, int(triton.next_power_of_2(width)))
    grid = (num_sequences, int(triton.cdiv(width, block)))
    return grid, {"BLOCK": block, "num_warps": max(1, block // 32)}
