"""The smallest Triton kernel. Imported only where Triton is installed."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _double(x, y, size: tl.constexpr):
    offsets = tl.arange(0, size)
    tl.store(y + offsets, tl.load(x + offsets) * 2)


def doubled(x: Tensor) -> Tensor:
    """2 x, for a vector on CUDA whose length is a power of two."""
    y = torch.empty_like(x)
    _double[(1,)](x, y, x.numel())  # pyright: ignore[reportIndexIssue, reportArgumentType]
    return y
