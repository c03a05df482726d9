"""Norms of a residual stream as operators of PyTorch that pack and compile.

    norm(x, w, b)                      -> n            n = LayerNorm(x; w, b)
    add_norms(x, y, w2, b2, w, b)      -> t, n         s = x + y,  t = s + LayerNorm(s; w2, b2),
                                                       n = LayerNorm(t; w, b)

The second is what happens between the mixers of two blocks whose state mixer is the identity: the
stream is read once and written once for each of its two new values, where separate norms and
additions, and their gradients, move it a dozen times. On CUDA with Triton kernels do it
(`_kernels.py`); elsewhere it is written out.

Letters   G groups with weights of their own, B batch, T time, D width, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.mixers import HAS_TRITON
from recallzoo.mixers._groups import over_groups

MAX_WIDTH = 2048
"""Beyond, a row no longer fits into the registers of a program."""


def is_fused(x: Tensor, *norms: nn.Module) -> bool:
    """Whether kernels take these norms of this stream."""
    if not (x.is_cuda and HAS_TRITON and x.shape[-1] <= MAX_WIDTH):
        return False
    return all(
        isinstance(norm, nn.LayerNorm)
        and norm.eps == _eps(norms)
        and norm.bias is not None
        and norm.weight.dtype == torch.float32
        for norm in norms
    )


def _eps(norms: tuple[nn.Module, ...]) -> float:
    return float(norms[0].eps)  # pyright: ignore[reportArgumentType]


def normed(norm: nn.Module, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """The norm of the stream, in its dtype."""
    assert isinstance(norm, nn.LayerNorm)
    return _norm(x, norm.weight[None], norm.bias[None], norm.eps)


def added_and_normed(
    x: Float[Tensor, "B T D"], y: Float[Tensor, "B T D"], inner: nn.Module, outer: nn.Module
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """The stream after both halves of a block, and its norm before the next."""
    assert isinstance(inner, nn.LayerNorm)
    assert isinstance(outer, nn.LayerNorm)
    weights = (inner.weight, inner.bias, outer.weight, outer.bias)
    _, t, n = _add_norms(x, y.to(x.dtype), *(w[None] for w in weights), inner.eps)
    return t, n


def _grouped(tensors: tuple[Tensor, ...], groups: int) -> list[Tensor]:
    return [x.contiguous().view(groups, -1, x.shape[-1]) for x in tensors]


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


@torch.library.custom_op("recallzoo::norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [G B, T, D], weight and bias [G, D] in float32."""
    from recallzoo.norms import _kernels as kernel

    [rows] = _grouped((x,), len(weight))
    return kernel.norm(rows, weight.contiguous(), bias.contiguous(), eps).view(x.shape)


@torch.library.custom_op("recallzoo::norm_backward", mutates_args=())
def _norm_backward(x: Tensor, weight: Tensor, d_n: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradient of x, and [G, 4, D], whose last two rows are those of weight and bias."""
    from recallzoo.norms import _kernels as kernel

    rows, d_rows = _grouped((x, d_n), len(weight))
    d_x, sums = kernel.norm_gradients(rows, d_rows, weight.contiguous(), eps)
    return d_x.view(x.shape), sums


@torch.library.custom_op("recallzoo::add_norms", mutates_args=())
def _add_norms(
    x: Tensor,
    y: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    outer_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """s, t and n; s is there for the gradients alone."""
    from recallzoo.norms import _kernels as kernel

    rows, more_rows = _grouped((x, y), len(inner_weight))
    inner = inner_weight.contiguous(), inner_bias.contiguous()
    outer = outer_weight.contiguous(), outer_bias.contiguous()
    s, t, n = kernel.add_norms(rows, more_rows, *inner, *outer, eps)
    return s.view(x.shape), t.view(x.shape), n.view(x.shape)


@torch.library.custom_op("recallzoo::add_norms_backward", mutates_args=())
def _add_norms_backward(
    s: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    d_t: Tensor,
    d_n: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of s, and [G, 4, D]: inner weight and bias, outer weight and bias."""
    from recallzoo.norms import _kernels as kernel

    rows, d_t_rows, d_n_rows = _grouped((s, d_t, d_n), len(inner_weight))
    inner = inner_weight.contiguous(), inner_bias.contiguous()
    d_s, sums = kernel.add_norms_gradients(
        rows, d_t_rows, d_n_rows, *inner, outer_weight.contiguous(), eps
    )
    return d_s.view(s.shape), sums


@_norm.register_fake
def _(x, weight, bias, eps):  # noqa: ARG001
    return _dense(x)[0]


@_norm_backward.register_fake
def _(x, weight, d_n, eps):  # noqa: ARG001
    return _dense(x)[0], weight.new_empty(len(weight), 4, weight.shape[1])


@_add_norms.register_fake
def _(x, y, inner_weight, inner_bias, outer_weight, outer_bias, eps):  # noqa: ARG001
    return tuple(_dense(x, x, x))


@_add_norms_backward.register_fake
def _(s, inner_weight, inner_bias, outer_weight, d_t, d_n, eps):  # noqa: ARG001
    groups, width = inner_weight.shape
    return _dense(s)[0], inner_weight.new_empty(groups, 4, width)


def _save_norm(ctx, inputs, output) -> None:  # noqa: ARG001
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_gradients(ctx, d_n):
    x, weight = ctx.saved_tensors
    d_x, sums = _norm_backward(x, weight, d_n, ctx.eps)
    return d_x, sums[:, 2], sums[:, 3], None


def _save_add_norms(ctx, inputs, output) -> None:
    _, _, inner_weight, inner_bias, outer_weight, _, ctx.eps = inputs
    ctx.save_for_backward(output[0], inner_weight, inner_bias, outer_weight)


def _add_norms_gradients(ctx, d_s, d_t, d_n):  # noqa: ARG001 (nobody sees s)
    d_stream, sums = _add_norms_backward(*ctx.saved_tensors, d_t, d_n, ctx.eps)
    return d_stream, d_stream, *sums.unbind(1), None


_norm.register_autograd(_norm_gradients, setup_context=_save_norm)
_add_norms.register_autograd(_add_norms_gradients, setup_context=_save_add_norms)


for _operator in (_norm, _norm_backward, _add_norms, _add_norms_backward):
    _operator.register_vmap(over_groups(_operator))
