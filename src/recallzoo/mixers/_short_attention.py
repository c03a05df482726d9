"""Causal attention over short sequences as an operator of PyTorch that packs and compiles.

    short_attention(qkv, bias, ...) -> y      from one packed projection, whose bias is added here,
                                              dropout of the weights included

Written out, q, k and v are copied to where batched products want them, the T by T weights pass
through memory several times, and the gradients are joined again. On CUDA with Triton, in bfloat16
and up to 128 channels a head, kernels read and write the packed projection itself.

Letters   N sequences, T time, H heads, K head width, G groups of N / G sequences, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON, Context, product_dtype
from recallzoo.mixers._groups import over_groups

MAX_HEAD_DIM = 128
"""Beyond, the accumulators of a block no longer fit into registers."""


def is_fused(x: Float[Tensor, "B T D"], head_dim: int) -> bool:
    """Whether a kernel takes the projection of this input."""
    is_here = x.is_cuda and HAS_TRITON and head_dim <= MAX_HEAD_DIM
    return is_here and product_dtype(x) == torch.bfloat16


def short_attention(
    qkv: Float[Tensor, "B T E"],
    bias: Float[Tensor, "E"] | None,
    num_heads: int,
    context: Context,
    dropout: float,
) -> Float[Tensor, "B T D"]:
    """Causal softmax attention of q, k and v side by side, E = 3 D = 3 H K, in one group."""
    words = context.dropout_words() if dropout > 0.0 else None
    if words is None:
        words = (torch.zeros((), dtype=torch.int32, device=qkv.device),) * 2
        dropout = 0.0
    low, high = words
    bias = torch.zeros(qkv.shape[-1], device=qkv.device) if bias is None else bias
    return _attend(qkv, bias[None], low[None], high[None], num_heads, dropout)[0]


@torch.library.custom_op("recallzoo::short_attention", mutates_args=())
def _attend(
    qkv: Tensor, bias: Tensor, low: Tensor, high: Tensor, num_heads: int, rate: float
) -> tuple[Tensor, Tensor]:
    """y [N, T, D] and the weights' normalisers [N, H, T], from qkv [N, T, 3 D], bias [G, 3 D] and
    the words of each group's masks, [G]."""
    from recallzoo.mixers._kernels import short_attention as kernel

    words = low.contiguous(), high.contiguous()
    return kernel.forward(qkv.contiguous(), bias.contiguous(), *words, num_heads, rate)


@torch.library.custom_op("recallzoo::short_attention_backward", mutates_args=())
def _backward(
    qkv: Tensor,
    bias: Tensor,
    y: Tensor,
    normalizers: Tensor,
    d_y: Tensor,
    low: Tensor,
    high: Tensor,
    num_heads: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels import short_attention as kernel

    words = low.contiguous(), high.contiguous()
    inputs = qkv.contiguous(), bias.contiguous()
    outputs = y.contiguous(), normalizers.contiguous()
    d_qkv = kernel.backward(*inputs, *outputs, d_y.contiguous(), *words, num_heads, rate)
    by_group = d_qkv.view(len(bias), -1, bias.shape[1])
    return d_qkv, by_group.sum(1, dtype=torch.float32)


@_attend.register_fake
def _(qkv, bias, low, high, num_heads, rate):  # noqa: ARG001
    N, T, packed = qkv.shape
    y = qkv.new_empty(N, T, packed // 3)
    return y, qkv.new_empty(N, num_heads, T, dtype=torch.float32)


@_backward.register_fake
def _(qkv, bias, y, normalizers, d_y, low, high, num_heads, rate):  # noqa: ARG001
    d_bias = torch.empty_like(bias, dtype=torch.float32, memory_format=torch.contiguous_format)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), d_bias


def _save(ctx, inputs, output) -> None:
    qkv, bias, low, high, ctx.num_heads, ctx.rate = inputs
    ctx.save_for_backward(qkv, bias, *output, low, high)


def _gradients(ctx, d_y, d_normalizers):  # noqa: ARG001 (nobody sees them)
    qkv, bias, y, normalizers, low, high = ctx.saved_tensors
    rest = low, high, ctx.num_heads, ctx.rate
    d_qkv, d_bias = _backward(qkv, bias, y, normalizers, d_y, *rest)
    return d_qkv, d_bias.to(bias.dtype), None, None, None, None


_attend.register_autograd(_gradients, setup_context=_save)


for _operator in (_attend, _backward):
    _operator.register_vmap(over_groups(_operator))
