"""Products whose results have the channels first, [D, B, T], and whose gradients have their
operands' layout.

Mixers that treat each channel alone along time read and write contiguous rows of T numbers. A
linear map can write that layout directly, as a product reads a transposed operand at no cost:

    to_channels     p[e, n] = sum over d of W[e, d] x[n, d]      = W x^T
    from_channels   y[n, e] = sum over d of z[d, n] W[e, d]      = z^T W^T

PyTorch differentiates a batched product with a transposed operand into a gradient in the other
layout, which is then copied. The operators below write gradients as their operands lie; in groups,
so that mapping over packed runs (`torch.func.vmap`) only adds groups.

Letters   B batch, T time, D and E widths, N = B T rows, G groups, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from recallzoo.mixers._contract import product_dtype
from recallzoo.mixers._groups import over_groups


def to_channels(weight: Float[Tensor, "E D"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "E B T"]:
    """A linear map without bias from [B, T, D] to channels first."""
    weight, x = _as_products(weight, x)
    # Squeezed, not indexed: the gradient of an index fills a tensor.
    p = rows_by_rows(weight[None], x.flatten(0, 1)[None]).squeeze(0)
    return p.unflatten(1, x.shape[:2])


def from_channels(
    z: Float[Tensor, "D B T"], weight: Float[Tensor, "E D"]
) -> Float[Tensor, "B T E"]:
    """A linear map without bias from channels first to [B, T, E]."""
    weight, z = _as_products(weight, z)
    y = columns_by_columns(z.flatten(1)[None], weight.transpose(0, 1)[None])
    return y.squeeze(0).unflatten(0, z.shape[1:])


def _as_products(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that a product has here: autocast does not reach custom operators."""
    dtype = product_dtype(x)
    return weight.to(dtype), x.to(dtype)


@torch.library.custom_op("recallzoo::rows_by_rows", mutates_args=())
def rows_by_rows(a: Tensor, b: Tensor) -> Tensor:
    """a b^T [G, M, N] from a [G, M, K] and b [G, N, K]."""
    return torch.bmm(a, b.transpose(1, 2))


@torch.library.custom_op("recallzoo::columns_by_columns", mutates_args=())
def columns_by_columns(a: Tensor, b: Tensor) -> Tensor:
    """a^T b [G, M, N] from a [G, K, M] and b [G, K, N]."""
    return torch.bmm(a.transpose(1, 2), b)


@rows_by_rows.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[1])


@columns_by_columns.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[2], b.shape[2])


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _rows_by_rows_backward(ctx, d_c: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad
    d_a = torch.bmm(d_c, b) if needs_a else None
    return d_a, torch.bmm(d_c.transpose(1, 2), a) if needs_b else None


def _columns_by_columns_backward(ctx, d_c: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad
    d_a = torch.bmm(b, d_c.transpose(1, 2)) if needs_a else None
    return d_a, torch.bmm(a, d_c) if needs_b else None


rows_by_rows.register_autograd(_rows_by_rows_backward, setup_context=_save)
columns_by_columns.register_autograd(_columns_by_columns_backward, setup_context=_save)


rows_by_rows.register_vmap(over_groups(rows_by_rows, dense=False))
columns_by_columns.register_vmap(over_groups(columns_by_columns, dense=False))


@register_flop_formula(torch.ops.recallzoo.rows_by_rows)
def _(a_shape, b_shape, *, out_shape=None, **_kwargs) -> int:  # noqa: ARG001
    groups, rows, inner = a_shape
    return 2 * groups * rows * inner * b_shape[1]


@register_flop_formula(torch.ops.recallzoo.columns_by_columns)
def _(a_shape, b_shape, *, out_shape=None, **_kwargs) -> int:  # noqa: ARG001
    groups, inner, rows = a_shape
    return 2 * groups * rows * inner * b_shape[2]
