"""Programmatic shift convolution: a spike at each lag where the present token repeats.

    h[t, s - 1] = 1 where x[t - s] = x[t],  for lags s >= 1
    c[t] = sum over s of h[t, s - 1] u[t - (s - 1)],   divided by their number with `normalise`
    y[t] = (W u[t] + b1) * (c[t] + b2)

A spike at s - 1 brings what followed the earlier occurrence: the key stands s back, its value
s - 1. With one-hot inputs, zeros for the filler token, W = 0, b1 = 1 and b2 = 0 this is the
construction behind Theorem 4.5,

    y = sum over s of E_s * shift(V, s - 1),    E_s = (Q * shift(K, s)) 1 1^T,    Q = K = V = u

for S = all lags, which answers MQAR exactly where keys are stored once.

Source   Arora et al. 2023, arXiv:2312.04927, equation 1, Theorem 4.5 and the programmatic filter
         of its input-dependent BaseConv.
Differs  The paper's filter belongs to a sequence: it has a spike at each lag at which any of its
         tokens repeats, also later ones. Here each position has the lags of its own token, which
         is causal, and needs no second layer to tell them apart; `autocorrelation_conv` is a
         filter for all tokens alike. `normalise` is ours: tokens of text repeat hundreds of times.
State    conv: all inputs, D T; index: the tokens, T.
Cost     O(B T D log T): sums over equal tokens, by doubling.
Letters  B batch, T time, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import Cache, Context, OptionValue
from recallzoo.mixers._distinct_rows import distinct_rows
from recallzoo.mixers._occurrences import occurrences
from recallzoo.mixers._shifts import ShiftFilter, tensor_of


class ShiftConv(ShiftFilter):
    """BaseConv whose filter has a spike where the present token repeats (arXiv:2312.04927).

    normalise   divide by the number of spikes
    """

    name: ClassVar[str] = "shift_conv"
    needs_tokens: ClassVar[bool] = True
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = ({"normalise": False},)

    def __init__(self, d_model: int, max_seq_len: int, *, normalise: bool = True) -> None:
        super().__init__(d_model, max_seq_len)
        self.normalise = normalise

    def convolve(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        """In the order of (token, position) the earlier occurrences of a token are the entries to
        the left of it: c is a sum over each token's entries, the present one left out."""
        found = occurrences(context.token_ids(self.name, 2))
        seq_len = x.shape[1]
        # The last position's entry gets the first row, and nothing stands behind it in its sum.
        total = distinct_rows(x.float(), (found.position + 1) % seq_len)
        place = found.place[..., None]
        reach = 1
        while reach < seq_len:
            total = total + torch.where(place >= reach, _shifted(total, reach), 0.0)
            reach *= 2
        c = torch.where(place >= 1, _shifted(total, 1), 0.0)
        if self.normalise:
            c = c / place.clamp(min=1)
        return distinct_rows(c, found.entry)

    def init_cache(self, batch_size: int) -> Cache:
        conv = self.bias.new_zeros(batch_size, 0, self.d_model)
        return {"conv": conv, "index": torch.zeros_like(conv[:, :, 0], dtype=torch.int64)}

    def convolve_step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        inputs = torch.cat([tensor_of(cache, "conv"), x_t[:, None]], dim=1)
        seen, token = tensor_of(cache, "index"), context.token_ids(self.name, 1)
        spikes = (seen == token[:, None]).float()
        c_t = (spikes[..., None] * inputs[:, 1:].float()).sum(1)
        if self.normalise:
            c_t = c_t / spikes.sum(1, keepdim=True).clamp(min=1)
        return c_t, {"conv": inputs, "index": torch.cat([seen, token[:, None]], dim=1)}


def _shifted(x: Float[Tensor, "B T D"], by: int) -> Float[Tensor, "B T D"]:
    return F.pad(x, (0, 0, by, 0))[:, : x.shape[1]]
