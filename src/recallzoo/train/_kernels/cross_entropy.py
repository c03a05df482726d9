"""Cross-entropy of a pack without its logits: Triton kernels for bfloat16 and widths up to 128.

    forward    a block of queries walks over the vocabulary, keeping a running maximum and sum
    d_hidden   the same walk again, the logits computed anew: p W - W[answer]
    d_head     a block of words walks over the queries: p^T H, the answers' part left out

Three products in place of the one that stored logits would need, but nothing of the vocabulary's
size is written or read: at width 64 the logits are 128 times as large as what makes them. What
concerns the answer is computed apart, so that a logit costs one exponential and little else.

Letters   R packed runs, N queries of a batch, V vocabulary, D width.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from recallzoo.train._kernels import embedding

MAX_WIDTH = 128
"""Beyond, the accumulators of a block no longer fit into registers."""
_MIN_DOT = 16
"""Smallest side of a block that tensor cores take."""


@triton.jit
def _block(pointer, row, col, num_rows, num_cols):
    """Rows of a row-major matrix, zero beyond its edges."""
    inside = (row[:, None] < num_rows) & (col[None, :] < num_cols)
    return tl.load(pointer + row[:, None] * num_cols + col[None, :], mask=inside, other=0.0)


@triton.jit
def _loss_forward(
    hidden,
    head,
    answers,
    losses,
    normalizers,
    best,
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    FIND_BEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    h = _block(hidden + run * N * D, row, col, N, D)
    answer = tl.load(answers + run * N + row, mask=row < N, other=0)
    right = _block(head + run * V * D, answer, col, V, D)
    right = tl.sum(h.to(tl.float32) * right.to(tl.float32), axis=1)
    largest = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    winner = tl.zeros([BLOCK_N], tl.int64)
    for start in range(0, V, BLOCK_V):
        word = start + tl.arange(0, BLOCK_V)
        w = _block(head + run * V * D, word, col, V, D)
        logits = tl.dot(h, tl.trans(w))
        if V % BLOCK_V != 0:
            logits = tl.where(word[None, :] < V, logits, -float("inf"))
        top = tl.max(logits, axis=1)
        if FIND_BEST:
            where = start + tl.argmax(logits, axis=1)
            winner = tl.where(top > largest, where.to(tl.int64), winner)
        new_largest = tl.maximum(largest, top)
        total = total * tl.exp(largest - new_largest)
        total += tl.sum(tl.exp(logits - new_largest[:, None]), axis=1)
        largest = new_largest
    normalizer = largest + tl.log(total)
    tl.store(normalizers + run * N + row, normalizer, mask=row < N)
    tl.store(losses + run * N + row, normalizer - right, mask=row < N)
    if FIND_BEST:
        tl.store(best + run * N + row, winner, mask=row < N)


@triton.jit
def _loss_d_hidden(
    hidden,
    head,
    answers,
    normalizers,
    d_hidden,
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    h = _block(hidden + run * N * D, row, col, N, D)
    answer = tl.load(answers + run * N + row, mask=row < N, other=0)
    normalizer = tl.load(normalizers + run * N + row, mask=row < N, other=0.0)
    gradient = -_block(head + run * V * D, answer, col, V, D).to(tl.float32)
    for start in range(0, V, BLOCK_V):
        word = start + tl.arange(0, BLOCK_V)
        w = _block(head + run * V * D, word, col, V, D)
        p = tl.exp(tl.dot(h, tl.trans(w)) - normalizer[:, None])
        if V % BLOCK_V != 0:
            # Words beyond the last have vectors of zeros, but infinity times zero is not a number.
            p = tl.where(word[None, :] < V, p, 0.0)
        gradient += tl.dot(p.to(h.dtype), w)
    inside = (row[:, None] < N) & (col[None, :] < D)
    gradient = (gradient / N).to(d_hidden.dtype.element_ty)
    tl.store(d_hidden + run * N * D + row[:, None] * D + col[None, :], gradient, mask=inside)


@triton.jit
def _loss_d_head(
    hidden,
    head,
    normalizers,
    d_head,
    N: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    col = tl.arange(0, BLOCK_D)
    w = _block(head + run * V * D, word, col, V, D)
    gradient = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        h = _block(hidden + run * N * D, row, col, N, D)
        # rows beyond the last have no probability
        normalizer = tl.load(normalizers + run * N + row, mask=row < N, other=float("inf"))
        p = tl.exp(tl.dot(w, tl.trans(h)) - normalizer[None, :])
        gradient += tl.dot(p.to(w.dtype), h)
    inside = (word[:, None] < V) & (col[None, :] < D)
    tl.store(d_head + run * V * D + word[:, None] * D + col[None, :], gradient / N, mask=inside)


def losses(
    hidden: Tensor, head: Tensor, answers: Tensor, *, find_best: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and normaliser (log of the sum of exponentials) of each query, [R, N] in nats, and the
    word with the largest logit (zeros without `find_best`). `hidden` [R, N, D] and `head`
    [R, V, D] are bfloat16."""
    hidden, head, answers = hidden.contiguous(), head.contiguous(), answers.contiguous()
    runs, num_queries, width = hidden.shape
    out = torch.empty(2, runs, num_queries, device=hidden.device)
    best = torch.zeros(runs, num_queries, dtype=torch.int64, device=hidden.device)
    sizes = _sizes(width)
    grid = (triton.cdiv(num_queries, sizes["BLOCK_N"]), runs)
    _loss_forward[grid](
        *(hidden, head, answers, out[0], out[1], best),
        *(num_queries, head.shape[1], width, find_best),
        **sizes,
    )
    return out[0], out[1], best


def gradients(
    hidden: Tensor, head: Tensor, answers: Tensor, normalizers: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of each run's mean loss: of `hidden` in its dtype, of `head` in float32."""
    hidden, head, answers = hidden.contiguous(), head.contiguous(), answers.contiguous()
    runs, num_queries, width = hidden.shape
    vocab_size = head.shape[1]
    d_hidden = torch.empty_like(hidden)
    d_head = torch.empty(head.shape, device=head.device)
    sizes = _sizes(width)
    shape = (num_queries, vocab_size, width)
    _loss_d_hidden[(triton.cdiv(num_queries, sizes["BLOCK_N"]), runs)](
        *(hidden, head, answers, normalizers, d_hidden), *shape, **sizes
    )
    _loss_d_head[(triton.cdiv(vocab_size, sizes["BLOCK_V"]), runs)](
        *(hidden, head, normalizers, d_head), *shape, **sizes
    )
    embedding.add_gradient(answers, hidden, d_head, scale=-1.0 / num_queries)
    return d_hidden, d_head


def _sizes(width: int) -> dict[str, int]:
    block_d = max(_MIN_DOT, int(triton.next_power_of_2(width)))
    return {"BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 3}
