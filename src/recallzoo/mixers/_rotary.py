"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 15), halves convention."""

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
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position.to(torch.float32)[..., None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
