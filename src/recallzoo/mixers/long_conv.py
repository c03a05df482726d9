"""Long convolution: each channel filtered by as many taps as the longest input has tokens.

    y[t] = sum over 0 <= k <= t of h[k] x[t - k]        by channel

Source   Arora et al. 2023, arXiv:2312.04927 (long convolutions); HazyResearch/zoology at
         dbcb60d, zoology/mixers/convolution.py (LongConvolution): taps are standard normal.
Differs  The reference adds x to the output, which only moves h[0] by one: `skip`, off by
         default. `bias` adds the constant that BaseConv has; the reference has none. It does not
         cut the filter to inputs shorter than max_seq_len, so that its last taps wrap onto the
         first tokens, which then see later ones. `init="decay"` is for filters of a thousand taps
         and more, whose sums standard normal taps would swamp everything else with: taps decay
         with the lag at a rate per channel, and each filter has norm 1 (cf. the geometric
         initialisation of Fu et al. 2023, arXiv:2302.06646).
State    conv: all inputs, D T.
Cost     O(B D T log T), or O(B D T^2) as matrix products where that is faster.
Letters  B batch, T time, D width.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import OptionValue
from recallzoo.mixers._convolution import Convolution


class LongConv(Convolution):
    """Causal depthwise convolution whose `max_seq_len` taps are parameters.

    init   "normal": taps are standard normal; "decay": they die away, each filter of norm 1
    """

    name: ClassVar[str] = "long_conv"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"skip": True, "bias": True},
        {"init": "decay"},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        bias: bool = False,
        skip: bool = False,
        init: Literal["normal", "decay"] = "normal",
    ) -> None:
        super().__init__(d_model, max_seq_len, bias=bias, skip=skip)
        if init not in ("normal", "decay"):
            raise InvalidConfig(f"long_conv.init={init!r} must be 'normal' or 'decay'.")
        taps = torch.randn(d_model, max_seq_len)
        if init == "decay":
            # Half-lives from one token to the whole filter, evenly spaced in their logarithm.
            spread = torch.linspace(0, 1, d_model, device=taps.device)[:, None]
            half_life = float(max_seq_len) ** spread
            taps = taps * 2 ** (-torch.arange(max_seq_len) / half_life)
            taps = taps / taps.norm(dim=1, keepdim=True)
        self.filter = nn.Parameter(taps)

    def filter_taps(self, seq_len: int) -> Float[Tensor, "D K"]:
        self._check_length(seq_len)
        return self.filter[:, :seq_len]
