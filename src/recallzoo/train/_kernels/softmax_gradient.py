"""Rows of logits become the gradient of their cross-entropy, in place: a Triton kernel.

    loss = logsumexp(row) - row[answer]          row <- softmax(row) - onehot(answer)

For rows too long for registers, in which `softmax_rows` holds its rows. A program reads its row
twice, and finds it in the GPU's cache the second time: 50,304 logits in bfloat16 are 100 KB, and
few programs run at once. The running maximum and sum are kept by each thread for itself (online
softmax, Milakov and Gimelshein 2018, arXiv:1805.02867) and meet after the last block.

Exponents are of base 2, which is what the GPU computes: with a = log2(e), exp(x - m) is
exp2(a x - a m), one multiply-add and one exponential.

Letters   N rows, V logits of a row, of which the first `vocab_size` are words: the others have
          probability 0.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ROWS, BLOCK_COLS = 512, 8
"""A block has 4,096 logits; 8 neighbours are one thread's, a load of 16 bytes in bfloat16."""
NUM_WARPS = 16
"""Programs of 8 warps take a third longer on an H100: of these, so many run at once that their rows
do not fit into its cache."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_block(x, largest, total):
    """The running maximum and sum of each thread's logits, with those of a block."""
    new_largest = tl.maximum(largest, tl.max(x, axis=1) * LOG2_E)
    total *= tl.exp2(largest - new_largest)
    total += tl.sum(tl.exp2(x * LOG2_E - new_largest[:, None]), axis=1)
    return new_largest, total


@triton.jit
def _gradient(
    logits,
    answers,
    losses,
    VOCAB_SIZE: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    WHOLE: tl.constexpr = VOCAB_SIZE // (ROWS * COLS) * (ROWS * COLS)  # words in whole blocks
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * V
    answer = tl.load(answers + n)
    is_word = (answer >= 0) & (answer < VOCAB_SIZE)
    score = tl.load(row + answer, mask=is_word, other=-float("inf")).to(tl.float32)
    offset = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]

    # From the least number rather than -inf, so that no difference of maxima is inf - inf.
    largest = tl.full([ROWS], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, WHOLE, ROWS * COLS):
        x = tl.load(row + start + offset).to(tl.float32)
        largest, total = _add_block(x, largest, total)
    if WHOLE < VOCAB_SIZE:
        word = WHOLE + offset
        x = tl.load(row + word, mask=word < V, other=-float("inf")).to(tl.float32)
        x = tl.where(word < VOCAB_SIZE, x, -float("inf"))
        largest, total = _add_block(x, largest, total)
    row_largest = tl.max(largest, axis=0)
    total *= tl.exp2(largest - row_largest)
    log2_total = row_largest + tl.log2(tl.sum(total, axis=0))
    tl.store(losses + n, log2_total / LOG2_E - score)

    tl.debug_barrier()  # every thread has the answer's score before it is overwritten
    for start in range(0, WHOLE, ROWS * COLS):
        here = row + start + offset
        x = tl.load(here, eviction_policy="evict_first").to(tl.float32)
        p = tl.exp2(x * LOG2_E - log2_total).to(logits.dtype.element_ty)
        tl.store(here, p, eviction_policy="evict_first")
    for start in range(WHOLE, V, ROWS * COLS):
        word = start + offset
        x = tl.load(row + word, mask=word < V, other=-float("inf")).to(tl.float32)
        x = tl.where(word < VOCAB_SIZE, x, -float("inf"))
        p = tl.exp2(x * LOG2_E - log2_total).to(logits.dtype.element_ty)
        tl.store(row + word, p, mask=word < V)
    tl.debug_barrier()  # the answer's gradient comes after what its thread has written there
    p = tl.exp2(score * LOG2_E - log2_total) - 1.0
    tl.store(row + answer, p.to(logits.dtype.element_ty), mask=is_word)


def gradient_in_place(
    logits: Float[Tensor, "N V"], answers: Int[Tensor, "N"], vocab_size: int
) -> Float[Tensor, "N"]:
    """Losses in nats, float32; `logits` are overwritten with the gradient of their sum.

    The loss of an answer that is not a word is infinite."""
    num_rows, width = logits.shape
    if not logits.is_contiguous():
        raise ValueError("logits that are overwritten in place must be contiguous")
    losses = torch.empty(num_rows, device=logits.device)
    _gradient[(num_rows,)](
        logits,
        answers.contiguous(),
        losses,
        vocab_size,
        width,
        ROWS=BLOCK_ROWS,
        COLS=BLOCK_COLS,
        num_warps=NUM_WARPS,
    )
    return losses
