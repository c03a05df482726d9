"""Next-token loss through the head, without the logits of all positions at once.

    loss = sum over n of  logsumexp_v(x[n] . W[v]) - x[n] . W[answer[n]]

The gradient of the logits, softmax - one-hot, is known as soon as they are; so each chunk of
positions makes its logits, loss and both gradients in the forward pass, and its logits are gone
before the next one's exist. No product is computed twice.

Letters  N positions, D width, V rows of the head, of which the first `vocab_size` are words: the
         others make products fast and have probability 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from recallzoo.mixers import HAS_TRITON, product_dtype

CHUNK_LOGITS = 1 << 29
"""Logits of a chunk that become their gradient in place: 1 GiB in bfloat16. The fewer chunks, the
fewer times is the weight's gradient, float32, read and written. Where float32 scores of the chunk
are stored as well, chunks have half as many."""
MIN_CHUNK = 256


def head_loss(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    answers: Int[Tensor, "N"],
    vocab_size: int,
) -> Float[Tensor, ""]:
    """Sum of the answers' cross-entropy, in nats."""
    return _HeadLoss.apply(x, weight, answers, vocab_size)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def token_losses(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    answers: Int[Tensor, "N"],
    vocab_size: int,
) -> Float[Tensor, "N"]:
    """Cross-entropy of each answer in nats, float32."""
    dtype = product_dtype(x)
    weight = weight.to(dtype)
    parts = []
    for rows in _chunks(x, weight, CHUNK_LOGITS // 2):
        logits = (x[rows].to(dtype) @ weight.T).float()[:, :vocab_size]
        parts.append(F.cross_entropy(logits, answers[rows], reduction="none"))
    return torch.cat(parts)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, answers: Tensor, vocab_size: int) -> Tensor:
        dtype = product_dtype(x)
        weight_cast = weight.to(dtype)
        is_in_place = x.is_cuda and HAS_TRITON
        softmax_gradient = _softmax_gradient_in_place if is_in_place else _softmax_gradient
        total = x.new_zeros((), dtype=torch.float32)
        x_grad = torch.empty_like(x, dtype=dtype)
        weight_grad = torch.zeros_like(weight)
        for rows in _chunks(x, weight, CHUNK_LOGITS if is_in_place else CHUNK_LOGITS // 2):
            chunk = x[rows].to(dtype)
            loss, gradient = softmax_gradient(chunk @ weight_cast.T, answers[rows], vocab_size)
            total += loss
            x_grad[rows] = gradient @ weight_cast
            weight_grad += gradient.T @ chunk
            del gradient  # or it would be there beside the next chunk's logits
        ctx.save_for_backward(x_grad, weight_grad)
        ctx.x_dtype = x.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        return (x_grad * grads[0]).to(ctx.x_dtype), weight_grad.mul_(grads[0]), None, None


def _softmax_gradient(
    logits: Float[Tensor, "N V"], answers: Int[Tensor, "N"], vocab_size: int
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """The loss and its gradient with respect to the logits, in their dtype."""
    scores = logits.float()
    word = torch.arange(logits.shape[1], device=logits.device)
    if vocab_size < logits.shape[1]:
        scores = scores.masked_fill(word >= vocab_size, -torch.inf)
    log_total = torch.logsumexp(scores, dim=1)
    loss = (log_total - scores.gather(1, answers[:, None])[:, 0]).sum()
    gradient = torch.exp(scores - log_total[:, None]) - (word == answers[:, None]).float()
    return loss, gradient.to(logits.dtype)


def _softmax_gradient_in_place(
    logits: Float[Tensor, "N V"], answers: Int[Tensor, "N"], vocab_size: int
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """`_softmax_gradient` by a kernel that overwrites the logits."""
    from recallzoo.train._kernels import softmax_gradient

    return softmax_gradient.gradient_in_place(logits, answers, vocab_size).sum(), logits


def _chunks(x: Tensor, weight: Tensor, num_logits: int) -> list[slice]:
    """Stretches of positions, all but the last of one length, a multiple of MIN_CHUNK."""
    size = max(1, num_logits // weight.shape[0] // MIN_CHUNK) * MIN_CHUNK
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]
