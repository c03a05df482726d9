"""What the convolutions with input-dependent shift filters share: BaseConv around a filter of
spikes that the input decides.

    y[t] = (W x[t] + b1) * (c[t] + b2),    c[t] = sum over lags l of h[t, l] x[t - l]

The filter h is a function of tokens up to t, with no parameters.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.mixers._contract import Cache, Context, Mixer


class ShiftFilter(Mixer):
    """BaseConv with a filter of spikes; subclasses say where they are.

    The gate starts near one, so that what the filter brings passes at first.
    """

    def __init__(self, d_model: int, max_seq_len: int) -> None:
        super().__init__(d_model, max_seq_len)
        self.gate = nn.Linear(d_model, d_model)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.ones_(self.gate.bias)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def convolve(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        """c of all positions."""
        raise NotImplementedError

    def convolve_step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        """c of the next position, and the new cache."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        return self._gated(x, self.convolve(x, context))

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        c_t, cache = self.convolve_step(x_t, cache, context)
        return self._gated(x_t, c_t), cache

    def _gated(self, x: Float[Tensor, "*S D"], c: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return (self.gate(x) * (c + self.bias)).to(x.dtype)


def tensor_of(cache: Cache, key: str) -> Tensor:
    """A leaf of a cache."""
    value = cache[key]
    assert isinstance(value, Tensor)
    return value
