"""Attention's packed projection turned by its positions, as an operator that packs and compiles.

    turned_heads(qkv, num_heads) -> q, k, v           q and k as by `_rotary.rotate`, whole heads

Letters   N sequences, T time, D width, H heads of K channels, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON
from recallzoo.mixers._groups import over_groups
from recallzoo.mixers._rotary import rotary_tables

BASE = 10_000.0


def is_fused(qkv: Float[Tensor, "B T E"], head_dim: int, rotary_dim: int) -> bool:
    """Whether a kernel turns these heads."""
    is_here = qkv.is_cuda and HAS_TRITON and qkv.dtype in (torch.bfloat16, torch.float16)
    return is_here and 0 < rotary_dim == head_dim


def turned_heads(
    qkv: Float[Tensor, "B T E"], num_heads: int
) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T K"], Float[Tensor, "B H T K"]]:
    """Queries, keys and values of positions 0, 1, ... from E = 3 H K, the first two turned."""
    half = qkv.shape[-1] // (6 * num_heads)
    cos, sin = rotary_tables(torch.arange(qkv.shape[1], device=qkv.device), half, BASE)
    q, k, v = (
        part.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for part in _apart(qkv.contiguous(), cos[None], sin[None])
    )
    return q, k, v


@torch.library.custom_op("recallzoo::turned_heads", mutates_args=())
def _apart(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From qkv [N, T, 3 D] and tables [G, T, K / 2], which are equal in all groups."""
    from recallzoo.mixers._kernels import rotary_heads as kernel

    return kernel.apart(qkv.contiguous(), cos[0].contiguous(), sin[0].contiguous())


@torch.library.custom_op("recallzoo::turned_heads_backward", mutates_args=())
def _together(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from recallzoo.mixers._kernels import rotary_heads as kernel

    dense = (t.contiguous() for t in (d_q, d_k, d_v, cos[0], sin[0]))
    return kernel.together(*dense)


@_apart.register_fake
def _(qkv, cos, sin):  # noqa: ARG001
    N, T, E = qkv.shape
    return tuple(qkv.new_empty(N, T, E // 3) for _ in range(3))


@_together.register_fake
def _(d_q, d_k, d_v, cos, sin):  # noqa: ARG001
    N, T, D = d_q.shape
    return d_q.new_empty(N, T, 3 * D)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx, d_q, d_k, d_v):
    parts = (part.contiguous() for part in (d_q, d_k, d_v))
    return _together(*parts, *ctx.saved_tensors), None, None


_apart.register_autograd(_gradient, setup_context=_save)


for _operator in (_apart, _together):
    _operator.register_vmap(over_groups(_operator))
