"""What of a model has the size of the vocabulary, for a whole pack: token vectors and the head.

Both stand outside of the compiled program: their gradients are known in closed form, and on CUDA
kernels of our own keep the logits from ever being stored.

    loss[n] = logsumexp(H[n] W^T) - H[n] . W[answer[n]]
    d mean(loss) / d H = (p - onehot) W / N,     d mean(loss) / d W = (p - onehot)^T H / N

Products are taken in the dtype of H, sums in float32.

Letters   R packed runs, N queries of a batch, V vocabulary, D width, E embedding width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recallzoo.mixers import HAS_TRITON

CHUNK_LOGIT_BYTES = 2**28
"""Logits that are held at once where they are stored. On an H100, 8,192 queries of width 512 take
431 us a run in chunks of 256 MiB, 489 in 64, 816 in 32: the cache is worth less than large
products."""


def look_up(
    weight: Float[Tensor, "R V E"], tokens: Int[Tensor, "R *S"], dtype: torch.dtype
) -> Float[Tensor, "R *S E"]:
    """The vectors of the tokens, as `dtype`. No gradient is recorded: see `add_gradient`."""
    _, vocab_size, width = weight.shape
    flat = tokens.flatten(1)
    if weight.is_cuda and HAS_TRITON:
        from recallzoo.train._kernels import embedding

        vectors = embedding.look_up(weight, flat, dtype)
    else:
        vectors = weight.flatten(0, 1).index_select(0, _own_rows(flat, vocab_size)).to(dtype)
    return vectors.view(*tokens.shape, width)


def add_gradient(
    tokens: Int[Tensor, "R *S"],
    d_vectors: Float[Tensor, "R *S E"],
    d_weight: Float[Tensor, "R V E"],
) -> None:
    """Add the gradient of `look_up` to `d_weight`, in place."""
    _, vocab_size, width = d_weight.shape
    flat, d_flat = tokens.flatten(1), d_vectors.reshape(len(tokens), -1, width)
    if d_weight.is_cuda and HAS_TRITON:
        from recallzoo.train._kernels import embedding

        embedding.add_gradient(flat, d_flat, d_weight)
    else:
        rows = _own_rows(flat, vocab_size)
        d_weight.view(-1, width).index_add_(0, rows, d_flat.flatten(0, 1).to(d_weight.dtype))


def _own_rows(tokens: Int[Tensor, "R N"], vocab_size: int) -> Int[Tensor, "M"]:
    """Rows of the runs' tables, one below the other, in which each run's tokens stand."""
    run = torch.arange(len(tokens), device=tokens.device)[:, None]
    return (tokens + run * vocab_size).flatten()


def loss_and_gradients(
    hidden: Float[Tensor, "R N D"], head: Float[Tensor, "R V D"], answers: Int[Tensor, "R N"]
) -> tuple[Float[Tensor, "R"], Float[Tensor, "R N D"], Float[Tensor, "R V D"]]:
    """Mean cross-entropy of each run in nats, and its gradients with respect to `hidden` (in its
    dtype) and `head` (in float32)."""
    weight = head.to(hidden.dtype)
    if _is_fused(hidden):
        from recallzoo.train._kernels import cross_entropy

        losses, normalizers, _ = cross_entropy.losses(hidden, weight, answers, find_best=False)
        d_hidden, d_head = cross_entropy.gradients(hidden, weight, answers, normalizers)
        return losses.mean(1), d_hidden, d_head
    losses = torch.empty(hidden.shape[:2], device=hidden.device)
    d_hidden = torch.empty_like(hidden)
    d_head = torch.empty(head.shape, device=head.device)
    rows = _rows_at_once(hidden, head.shape[1])
    for run in range(len(hidden)):
        for start in range(0, hidden.shape[1], rows):
            part = slice(start, start + rows)
            h = hidden[run, part]
            logits = h @ weight[run].T
            losses[run, part] = _gradient_in_place(logits, answers[run, part], hidden.shape[1])
            torch.mm(logits, weight[run], out=d_hidden[run, part])
            product = _product_float32(logits.T, h)
            d_head[run] = product if start == 0 else d_head[run] + product
    return losses.mean(1), d_hidden, d_head


def losses_and_words(
    hidden: Float[Tensor, "R N D"], head: Float[Tensor, "R V D"], answers: Int[Tensor, "R N"]
) -> tuple[Float[Tensor, "R N"], Int[Tensor, "R N"]]:
    """Cross-entropy of each query in nats, and the word with the largest logit."""
    weight = head.to(hidden.dtype)
    if _is_fused(hidden):
        from recallzoo.train._kernels import cross_entropy

        losses, _, best = cross_entropy.losses(hidden, weight, answers, find_best=True)
        return losses, best
    losses = torch.empty(hidden.shape[:2], device=hidden.device)
    best = torch.empty_like(answers)
    rows = _rows_at_once(hidden, head.shape[1])
    for run in range(len(hidden)):
        for start in range(0, hidden.shape[1], rows):
            part = slice(start, start + rows)
            logits = (hidden[run, part] @ weight[run].T).float()
            right = logits.gather(1, answers[run, part, None])[:, 0]
            losses[run, part] = torch.logsumexp(logits, dim=-1) - right
            best[run, part] = logits.argmax(-1)
    return losses, best


def _is_fused(hidden: Tensor) -> bool:
    if not (hidden.is_cuda and hidden.dtype == torch.bfloat16 and HAS_TRITON):
        return False
    from recallzoo.train._kernels import cross_entropy

    return hidden.shape[-1] <= cross_entropy.MAX_WIDTH


def _rows_at_once(hidden: Tensor, vocab_size: int) -> int:
    return max(1, CHUNK_LOGIT_BYTES // (vocab_size * hidden.element_size()))


def _gradient_in_place(
    logits: Float[Tensor, "N V"], answers: Int[Tensor, "N"], num_queries: int
) -> Float[Tensor, "N"]:
    """Losses; `logits` become the gradient of their sum over `num_queries`."""
    if logits.is_cuda and HAS_TRITON:
        from recallzoo.train._kernels import softmax_rows

        return softmax_rows.gradient_in_place(logits, answers, 1.0 / num_queries)
    index = answers[:, None]
    right = logits.gather(1, index)[:, 0].float()
    normalizer = torch.logsumexp(logits.float(), dim=-1)
    p = torch.exp(logits.float() - normalizer[:, None])
    p.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=p.dtype))
    logits.copy_(p / num_queries)
    return normalizer - right


def _product_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32 whatever the factors are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()
