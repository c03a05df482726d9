"""Short convolution: each channel filtered by a few taps of its own.

    y[t] = sum over 0 <= k < K of h[k] x[t - k] + b        by channel

Source   Arora et al. 2023, arXiv:2312.04927; HazyResearch/zoology at dbcb60d,
         zoology/mixers/convolution.py (ShortConvolution), and its initialisation: taps and bias
         uniform within 1 / sqrt(K).
Differs  The filter is stored by lag, [D, K], the present first. The reference counts K inputs
         of state; K - 1 are needed.
State    conv: the last K - 1 inputs, (K - 1) D.
Cost     O(B T K D).
Letters  B batch, T time, D width, K taps (kernel_size).
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import Cache, Context, OptionValue
from recallzoo.mixers._convolution import Convolution


class ShortConv(Convolution):
    """Causal depthwise convolution with `kernel_size` taps."""

    name: ClassVar[str] = "short_conv"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 12, "skip": True},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        kernel_size: int = 3,
        bias: bool = True,
        skip: bool = False,
    ) -> None:
        super().__init__(d_model, max_seq_len, bias=bias, skip=skip)
        if kernel_size < 1:
            raise InvalidConfig(f"short_conv.kernel_size={kernel_size} must be at least 1.")
        bound = kernel_size**-0.5
        self.filter = nn.Parameter(torch.empty(d_model, kernel_size).uniform_(-bound, bound))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def filter_taps(self, seq_len: int) -> Float[Tensor, "D K"]:
        return self.filter

    def init_cache(self, batch_size: int) -> Cache:
        num_taps = self.filter.shape[1]
        return {"conv": self.filter.new_zeros(batch_size, num_taps - 1, self.d_model)}

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        y_t, cache = super().step(x_t, cache, context)
        inputs = cache["conv"]
        assert isinstance(inputs, Tensor)
        return y_t, {"conv": inputs[:, 1:]}
