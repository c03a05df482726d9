"""Rows of logits become the gradient of their cross-entropy, in place: a Triton kernel.

    loss = logsumexp(row) - row[answer]          row <- (softmax(row) - onehot(answer)) / N

Letters   N queries, V vocabulary.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(logits, answers, losses, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK)
    inside = word < V
    x = tl.load(logits + row * V + word, mask=inside, other=-float("inf")).to(tl.float32)
    answer = tl.load(answers + row)
    largest = tl.max(x, axis=0)
    e = tl.exp(x - largest)
    total = tl.sum(e, axis=0)
    right = tl.sum(tl.where(word == answer, x, 0.0), axis=0)
    tl.store(losses + row, largest + tl.log(total) - right)
    gradient = (e / total - tl.where(word == answer, 1.0, 0.0)) * scale
    tl.store(logits + row * V + word, gradient.to(logits.dtype.element_ty), mask=inside)


def gradient_in_place(logits: Tensor, answers: Tensor, scale: float) -> Tensor:
    """Losses [N] in nats; `logits` [N, V] are overwritten with `scale` times their gradients."""
    num_rows, vocab_size = logits.shape
    if not logits.is_contiguous():
        raise ValueError("logits that are overwritten in place must be contiguous")
    answers = answers.contiguous()
    losses = torch.empty(num_rows, device=logits.device)
    block = triton.next_power_of_2(vocab_size)
    _rows[(num_rows,)](logits, answers, losses, vocab_size, scale, BLOCK=block, num_warps=8)
    return losses
