"""Long convolution: each channel filtered by as many taps as the longest input has tokens.

    y[t] = sum over 0 <= k <= t of h[k] x[t - k]        by channel

Source   Arora et al. 2023, arXiv:2312.04927 (long convolutions); HazyResearch/zoology at
         dbcb60d, zoology/mixers/convolution.py (LongConvolution): taps are standard normal.
Differs  The reference adds x to the output, which only moves h[0] by one: `skip`, off by
         default. `bias` adds the constant that BaseConv has; the reference has none. It does not
         cut the filter to inputs shorter than max_seq_len, so that its last taps wrap onto the
         first tokens, which then see later ones.
State    conv: all inputs, D T.
Cost     O(B D T log T), or O(B D T^2) as matrix products where that is faster.
Letters  B batch, T time, D width.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.mixers._contract import OptionValue
from recallzoo.mixers._convolution import Convolution


class LongConv(Convolution):
    """Causal depthwise convolution whose `max_seq_len` taps are parameters."""

    name: ClassVar[str] = "long_conv"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = ({"skip": True, "bias": True},)

    def __init__(
        self, d_model: int, max_seq_len: int, *, bias: bool = False, skip: bool = False
    ) -> None:
        super().__init__(d_model, max_seq_len, bias=bias, skip=skip)
        self.filter = nn.Parameter(torch.randn(d_model, max_seq_len))

    def filter_taps(self, seq_len: int) -> Float[Tensor, "D K"]:
        self._check_length(seq_len)
        return self.filter[:, :seq_len]
