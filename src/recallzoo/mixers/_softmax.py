"""Softmax attention over a causal window, in the form that suits the caller.

Short sequences use plain batched products: under `torch.func.vmap` the run axis folds into
their batch, and any head width keeps the same speed. Long ones use PyTorch's fused operator,
which never holds the T by T scores. A window much shorter than the sequence is computed in
blocks, each of which looks at itself and the block before: O(T window) time and memory.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recallzoo.mixers._contract import Context

PLAIN_MAX_SEQ_LEN = 512
"""Up to this many tokens the T by T scores are held; beyond, the fused operator is used."""
MIN_BLOCK = 64
"""Fewest queries to a block: products of smaller blocks leave the hardware idle."""


def causal_mask(
    query: Int[Tensor, "*Q 1"], seq_len: int, window: int | None
) -> Bool[Tensor, "*Q T"]:
    """True where queries at these positions may look: at their own and, within `window`, earlier
    ones."""
    key = torch.arange(seq_len, device=query.device)
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def attend(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T K"],
    context: Context,
    *,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T K"]:
    """softmax(q k^T / sqrt(K)) v over the `window` latest positions (all if None)."""
    seq_len = q.shape[-2]
    if window is not None:
        block = max(window, MIN_BLOCK)
        if seq_len > 2 * block:
            return _attend_in_blocks(q, k, v, context, window, block, dropout)
    drops = dropout > 0.0 and context.dropout_key is not None
    is_fused = seq_len > PLAIN_MAX_SEQ_LEN and not drops
    if is_fused and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = causal_mask(torch.arange(seq_len, device=q.device)[:, None], seq_len, window)
    if is_fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _attend_plainly(q, k, v, mask, context, dropout)


def attend_at(
    q: Float[Tensor, "B H Q K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T K"],
    positions: Int[Tensor, "B Q"],
    context: Context,
    *,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H Q K"]:
    """`attend` for queries that stand at `positions`, in any order. Holds the Q by T scores."""
    mask = causal_mask(positions[:, None, :, None], k.shape[-2], window)
    return _attend_plainly(q, k, v, mask, context, dropout)


def read_at(
    q: Float[Tensor, "B H Q K"],
    x: Float[Tensor, "B T D"],
    key_map: Float[Tensor, "H K D"],
    value_map: Float[Tensor, "H K D"],
    value_bias: Float[Tensor, "H K"] | None,
    positions: Int[Tensor, "B Q"],
    context: Context,
    *,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H Q K"]:
    """`attend_at` of keys W_k x (+ any bias) and values W_v x + b, neither of which is made: the
    maps are applied to the queries and to what they read.

        q . (W_k x[s] + b_k) = (q W_k) . x[s] + (one number for all s, which softmax does not see)
        sum over s of a[s] (W_v x[s] + b) = W_v (sum over s of a[s] x[s]) + b sum over s of a[s]

    O(B H Q T D) and O(B Q D^2): less than attend_at with its maps where queries are few.
    """
    H, Q = q.shape[1:3]
    mask = causal_mask(positions[:, None, :, None], x.shape[-2], window)
    towards = torch.einsum("bhqk,hkd->bhqd", q / math.sqrt(q.shape[-1]), key_map)
    scores = (towards.flatten(1, 2) @ x.transpose(-1, -2)).unflatten(1, (H, Q))
    weights = _weights(scores, mask, context, dropout)
    read = (weights.flatten(1, 2) @ x).unflatten(1, (H, Q))
    y = torch.einsum("bhqd,hkd->bhqk", read, value_map)
    if value_bias is None:
        return y
    drops = dropout > 0.0 and context.training
    shares = weights.sum(-1, keepdim=True) if drops else 1.0
    return y + (value_bias[:, None] * shares).to(y.dtype)


def _attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: Context, dropout: float
) -> Tensor:
    """Attention that holds its scores; `mask` is True where a query may look."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    return _weights(scores, mask, context, dropout) @ v


def _weights(scores: Tensor, mask: Tensor, context: Context, dropout: float) -> Tensor:
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    return context.dropout(weights, dropout)


def _attend_in_blocks(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T K"],
    context: Context,
    window: int,
    block: int,
    dropout: float,
) -> Float[Tensor, "B H T K"]:
    """Windowed attention by blocks of `block` >= `window` queries, N of them."""
    B, H, seq_len, _ = q.shape
    padding = -seq_len % block
    q = F.pad(q, (0, 0, 0, padding)).unflatten(-2, (-1, block))
    k, v = (
        torch.cat([padded[..., :-1, :, :], padded[..., 1:, :, :]], dim=-2)
        for part in (k, v)
        for padded in [F.pad(part, (0, 0, block, padding)).unflatten(-2, (-1, block))]
    )
    key = torch.arange(2 * block, device=q.device)
    query = block + torch.arange(block, device=q.device)[:, None]
    exists = (torch.arange(q.shape[-3], device=q.device)[:, None, None] > 0) | (key >= block)
    mask = exists & (key <= query) & (key > query - window)
    drops = dropout > 0.0 and context.dropout_key is not None
    if block > PLAIN_MAX_SEQ_LEN and not drops:
        y = F.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask
        ).unflatten(0, (B, H))
    else:
        y = _attend_plainly(q, k, v, mask, context, dropout)
    return y.flatten(-3, -2)[..., :seq_len, :]
