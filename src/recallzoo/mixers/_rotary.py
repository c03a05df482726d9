"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 15), halves convention.

    y[i]        = x[i] cos(a[i]) - x[i + half] sin(a[i])
    y[i + half] = x[i + half] cos(a[i]) + x[i] sin(a[i])        a[i] = position base^(-i / half)

On CUDA the tables cos(a) and sin(a) come from an operator. PyTorch's compiler would make the power,
the cosine and the sine part of what reads them, and take them anew for every element of x, of every
head and sequence, in both passes; what an operator gives is read. On the CPU the operator's own
overhead is longer than the arithmetic, and the tables are written out.

Letters   S the axes of x but the last, K width of a head, P axes of the positions.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "*S K"], position: Int[Tensor, "..."], rotary_dim: int, base: float = 10000.0
) -> Float[Tensor, "*S K"]:
    """Turn the first `rotary_dim` of the last axis by the angles position * base**(-2i / dim).

    `position` must broadcast against x without its last axis. Channel i is paired with
    channel i + rotary_dim / 2; the rest passes unchanged.
    """
    if rotary_dim == 0:
        return x
    half = rotary_dim // 2
    cos, sin = (table.to(x.dtype) for table in rotary_tables(position, half, base))
    first, second = x[..., :half], x[..., half:rotary_dim]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rotary_dim < x.shape[-1]:
        parts.append(x[..., rotary_dim:])
    return torch.cat(parts, dim=-1)


def rotary_tables(
    position: Int[Tensor, "*P"], half: int, base: float
) -> tuple[Float[Tensor, "*P half"], Float[Tensor, "*P half"]]:
    """cos and sin of position * base**(-i / half) for i < half, in float32."""
    make = by_operator if position.is_cuda else written_out
    return make(position, half, base)


def written_out(
    position: Int[Tensor, "*P"], half: int, base: float
) -> tuple[Float[Tensor, "*P half"], Float[Tensor, "*P half"]]:
    """`rotary_tables` for the compiler to see."""
    frequency = base ** (torch.arange(half, device=position.device, dtype=torch.float32) / -half)
    angle = position.to(torch.float32)[..., None] * frequency
    return angle.cos(), angle.sin()


@torch.library.custom_op("recallzoo::rotary_table", mutates_args=())
def by_operator(position: Tensor, half: int, base: float) -> tuple[Tensor, Tensor]:
    """`rotary_tables` as an operator."""
    cos, sin = written_out(position, half, base)
    # A transposed input's order of axes would be kept in memory; the compiler is told of none.
    return cos.contiguous(), sin.contiguous()


@by_operator.register_fake
def _(position, half, base):  # noqa: ARG001
    shape = (*position.shape, half)
    return tuple(position.new_empty(shape, dtype=torch.float32) for _ in range(2))


@by_operator.register_vmap
def _(info, in_dims, position, half, base):  # noqa: ARG001
    """Each position has a row of its own and the axis of rows comes last, so a mapped axis of the
    positions is one more, and stays where it is."""
    return by_operator(position, half, base), (in_dims[0], in_dims[0])
