"""Attention's packed projection turned by its positions, as an operator that packs and compiles.

    turned_heads(qkv, num_heads, rotary_dim) -> q, k, v       q and k as by `_rotary.rotate`

Letters   N sequences, T time, D width, H heads of K channels, R packed runs, half the pairs of a
          head that are turned.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON
from recallzoo.mixers._groups import over_groups
from recallzoo.mixers._rotary import rotary_tables

BASE = 10_000.0


def is_fused(qkv: Float[Tensor, "B T E"], head_dim: int, rotary_dim: int) -> bool:
    """Whether a kernel turns these heads. What is not turned of a head is moved in pairs too, so
    its width must be even."""
    is_here = qkv.is_cuda and HAS_TRITON and qkv.dtype in (torch.bfloat16, torch.float16)
    return is_here and 0 < rotary_dim <= head_dim and head_dim % 2 == 0


def turned_heads(
    qkv: Float[Tensor, "B T E"], num_heads: int, rotary_dim: int
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T K"], Float[Tensor, "B H T K"]]:
    """Queries, keys and values of positions 0, 1, ... from E = 3 H K, K even. Of queries and keys
    the first `rotary_dim` channels of each head are turned, the rest pass unchanged."""
    position = torch.arange(qkv.shape[1], device=qkv.device)
    cos, sin = rotary_tables(position, rotary_dim // 2, BASE)
    q, k, v = (
        part.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for part in _apart(qkv.contiguous(), cos[None], sin[None], num_heads)
    )
    return q, k, v


@torch.library.custom_op("recallzoo::turned_heads", mutates_args=())
def _apart(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """From qkv [N, T, 3 D] and tables [G, T, half], which are equal in all groups."""
    from recallzoo.mixers._kernels import rotary_heads as kernel

    return kernel.apart(qkv.contiguous(), cos[0].contiguous(), sin[0].contiguous(), num_heads)


@torch.library.custom_op("recallzoo::turned_heads_backward", mutates_args=())
def _together(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> Tensor:
    from recallzoo.mixers._kernels import rotary_heads as kernel

    d_q, d_k, d_v, a, b = (t.contiguous() for t in (d_q, d_k, d_v, cos[0], sin[0]))
    return kernel.together(d_q, d_k, d_v, a, b, num_heads)


@_apart.register_fake
def _(qkv, cos, sin, num_heads):  # noqa: ARG001
    N, T, E = qkv.shape
    return tuple(qkv.new_empty(N, T, E // 3) for _ in range(3))


@_together.register_fake
def _(d_q, d_k, d_v, cos, sin, num_heads):  # noqa: ARG001
    N, T, D = d_q.shape
    return d_q.new_empty(N, T, 3 * D)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    _, cos, sin, ctx.num_heads = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx, d_q, d_k, d_v):
    parts = (part.contiguous() for part in (d_q, d_k, d_v))
    return _together(*parts, *ctx.saved_tensors, ctx.num_heads), None, None, None


_apart.register_autograd(_gradient, setup_context=_save)


for _operator in (_apart, _together):
    _operator.register_vmap(over_groups(_operator))
