"""RWKV-4 time mixing: a weighted mean of past values with a decay per channel.

    k, v, r  = W_k (mu_k x[t] + (1 - mu_k) x[t-1]),  W_v (...),  W_r (...)
    wkv[t]   =  sum over s < t of e^(k[s] - (t-1-s) w) v[s]  +  e^(u + k[t]) v[t]
               -------------------------------------------------------------------
                sum over s < t of e^(k[s] - (t-1-s) w)       +  e^(u + k[t])
    y[t]     = W_o (sigmoid(r) * wkv[t]),            w = e^time_decay > 0,  u = time_first

all products and quotients by channel.

Source   Peng et al. 2023, arXiv:2305.13048, eq. 11-15, 19-22; HazyResearch/zoology at dbcb60d,
         zoology/mixers/rwkv.py (RWKVTimeMixer), whose parameter names these are.
Differs  The reference computes wkv in a CUDA kernel. It sets its matrices aside for zero
         initialisation and never does it, and its model, which draws linear maps with standard
         deviation 0.02, does not see into a scripted module: they stay as PyTorch draws them,
         `init="torch"`. The default here is 0.02; `init="zero"` is the RWKV release's.
         The output projection is called `output`, so that a model leaves its scale alone, as
         there.
State    conv: the input before, D. matrix: numerator, denominator and their common exponent,
         3 D.
Cost     O(B T D (D + RADIX)): see `_decayed_sums`. With Triton on CUDA the gated
         wkv is a scan in registers, and the three mixtures are made at once. For the outputs of
         some positions alone, gate and output are computed there alone.
Letters  B batch, T time, D width, N blocks, P parts.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import Cache, Context, Mixer, OptionValue, select_positions
from recallzoo.mixers._token_shift import has_kernels, token_shift_mix
from recallzoo.mixers._wkv4 import wkv4

RADIX = 4
"""Positions that are summed directly; longer stretches are sums of sums."""
EMPTY = -1e38
"""The exponent of a sum without terms. Finite, so that differences of two stay numbers."""


class RWKV4(Mixer):
    """RWKV-4 time mixing (arXiv:2305.13048).

    layer_index, num_layers   where in a network the mixer stands, which sets its initial decays
                              and mixing ratios (appendix D). The defaults are the first of 12
                              layers; the reference counts 12 for any depth.
    init                      "normal": matrices of standard deviation 0.02; "torch": as PyTorch
                              draws linear maps; "zero": key, receptance and output start at
                              zero, value orthogonal
    """

    name: ClassVar[str] = "rwkv4"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"layer_index": 1, "num_layers": 2},
        {"init": "zero"},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        layer_index: int = 0,
        num_layers: int = 12,
        init: Literal["normal", "torch", "zero"] = "normal",
    ) -> None:
        super().__init__(d_model, max_seq_len)
        if not 0 <= layer_index < num_layers:
            raise InvalidConfig(
                f"rwkv4.layer_index={layer_index} must be in 0..{num_layers - 1}: "
                f"num_layers={num_layers} and the first layer is 0."
            )
        if init not in ("normal", "torch", "zero"):
            raise InvalidConfig(f"rwkv4.init={init!r} must be 'normal', 'torch' or 'zero'.")
        depth = layer_index / max(num_layers - 1, 1)
        height = 1.0 - layer_index / num_layers
        channel = torch.arange(d_model, dtype=torch.float32)
        spread = channel / max(d_model - 1, 1)
        ratio = channel / d_model
        zigzag = 0.5 * ((torch.arange(d_model) + 1) % 3 - 1)
        self.time_decay = nn.Parameter(-5.0 + 8.0 * spread ** (0.7 + 1.3 * depth))
        self.time_first = nn.Parameter(math.log(0.3) + zigzag)
        self.time_mix_k = nn.Parameter(ratio**height)
        self.time_mix_v = nn.Parameter(ratio**height + 0.3 * depth)
        self.time_mix_r = nn.Parameter(ratio ** (0.5 * height))
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        for linear in (self.key, self.value, self.receptance, self.output):
            if init == "normal":
                nn.init.normal_(linear.weight, std=0.02)
            elif init == "zero" and linear is self.value:
                nn.init.orthogonal_(linear.weight)
            elif init == "zero":
                nn.init.zeros_(linear.weight)

    def _project(
        self, x: Float[Tensor, "*S D"], before: Float[Tensor, "*S D"]
    ) -> tuple[Float[Tensor, "*S D"], Float[Tensor, "*S D"], Float[Tensor, "*S D"]]:
        """Keys, values and the gate, from each input and the one before it."""
        return *self._keys_and_values(x, before), self._gate(x, before)

    def _keys_and_values(
        self, x: Float[Tensor, "*S D"], before: Float[Tensor, "*S D"]
    ) -> tuple[Float[Tensor, "*S D"], Float[Tensor, "*S D"]]:
        k = self.key(before + (x - before) * self.time_mix_k)
        return k, self.value(before + (x - before) * self.time_mix_v)

    def _gate(
        self, x: Float[Tensor, "*S D"], before: Float[Tensor, "*S D"]
    ) -> Float[Tensor, "*S D"]:
        return torch.sigmoid(self.receptance(before + (x - before) * self.time_mix_r))

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        decay, first = self.time_decay.float().exp(), self.time_first.float()
        if has_kernels(x):
            return self.output(wkv4(self._projected(x, 3), decay, first))
        k, v, gate = self._project(x, _one_later(x, 0.0))
        wkv = weighted_mean(k.float(), v.float(), decay, first)
        return self.output(gate * wkv.to(gate.dtype))

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        decay, first = self.time_decay.float().exp(), self.time_first.float()
        if has_kernels(x):
            wkv = wkv4(self._projected(x, 2), decay, first)
        else:
            k, v = self._keys_and_values(x, _one_later(x, 0.0))
            wkv = weighted_mean(k.float(), v.float(), decay, first)
        both = torch.cat([positions, (positions - 1).clamp(min=0)], dim=1)
        x, before = select_positions(x, both).chunk(2, dim=1)
        gate = self._gate(x, before * (positions > 0)[:, :, None])
        return self.output(gate * select_positions(wkv, positions).to(gate.dtype))

    def _projected(self, x: Float[Tensor, "B T D"], num_parts: int) -> Float[Tensor, "P B T D"]:
        """Keys, values and, of three parts, receptances by one product. What is stacked is
        small."""
        ratios = (self.time_mix_k, self.time_mix_v, self.time_mix_r)
        maps = (self.key, self.value, self.receptance)
        mixed = token_shift_mix(x, torch.stack(ratios[:num_parts]))
        weights = torch.stack([linear.weight for linear in maps[:num_parts]])
        return torch.bmm(mixed.flatten(1, 2), weights.mT).unflatten(1, x.shape[:2])

    def init_cache(self, batch_size: int) -> Cache:
        weight = self.key.weight
        sums = weight.new_zeros(batch_size, 2, self.d_model, dtype=torch.float32)
        exponent = torch.full_like(sums[:, :1], EMPTY)
        return {
            "conv": weight.new_zeros(batch_size, self.d_model),
            "matrix": torch.cat([exponent, sums], dim=1),
        }

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        before, state = cache["conv"], cache["matrix"]
        assert isinstance(before, Tensor)
        assert isinstance(state, Tensor)
        k, v, gate = self._project(x_t, before)
        k, v = k.float(), v.float()
        exponent, total, weight = state.unbind(1)
        wkv = _with_current(exponent, total, weight, k + self.time_first.float(), v)
        decayed = exponent - self.time_decay.float().exp()
        exponent = torch.maximum(decayed, k).detach()
        keep, add = torch.exp(decayed - exponent), torch.exp(k - exponent)
        state = torch.stack([exponent, keep * total + add * v, keep * weight + add], dim=1)
        return self.output(gate * wkv.to(gate.dtype)), {"conv": x_t, "matrix": state}


def weighted_mean(
    k: Float[Tensor, "B T D"],
    v: Float[Tensor, "B T D"],
    decay: Float[Tensor, "D"],
    first: Float[Tensor, "D"],
) -> Float[Tensor, "B T D"]:
    """wkv of all positions at once, in PyTorch; on CUDA `_wkv4` scans instead, gate included."""
    exponent, total, weight = _decayed_sums(k, v, None, decay)
    return _with_current(
        _one_later(exponent, EMPTY),
        _one_later(total, 0.0),
        _one_later(weight, 0.0),
        k + first,
        v,
    )


def _one_later(x: Float[Tensor, "*S T D"], first: float) -> Float[Tensor, "*S T D"]:
    """x[t-1] at t, and `first` at 0."""
    return F.pad(x, (0, 0, 1, 0), value=first)[..., :-1, :]


def _with_current(
    exponent: Float[Tensor, "*S"],
    total: Float[Tensor, "*S"],
    weight: Float[Tensor, "*S"],
    current: Float[Tensor, "*S"],
    v: Float[Tensor, "*S"],
) -> Float[Tensor, "*S"]:
    """(e^exponent total + e^current v) / (e^exponent weight + e^current)"""
    # Here and below the largest exponent only fixes the scale, which cancels from the quotient,
    # so no gradient needs to pass through it.
    largest = torch.maximum(exponent, current).detach()
    past, now = torch.exp(exponent - largest), torch.exp(current - largest)
    return (past * total + now * v) / (past * weight + now)


def _decayed_sums(
    exponent: Float[Tensor, "*S T D"],
    total: Float[Tensor, "*S T D"],
    weight: Float[Tensor, "*S T D"] | None,
    decay: Float[Tensor, "D"],
) -> tuple[Tensor, Tensor, Tensor]:
    """(E, A, B) with e^E[t] (A, B)[t] = sum over s <= t of e^(exponent[s] - (t-s) decay)
    (total, weight)[s], where E is the largest exponent of its terms, so nothing overflows and
    one term at least does not vanish, however far the exponents lie apart.

    Blocks of RADIX positions are summed directly, then the blocks' last sums by this same
    function, so the work is O(T RADIX D) and the depth log_RADIX(T). A `weight` of None is 1.
    """
    seq_len = exponent.shape[-2]
    radix = min(RADIX, seq_len)
    padding = (0, 0, 0, -seq_len % radix)
    exponent = F.pad(exponent, padding, value=EMPTY).unflatten(-2, (-1, radix))
    total = F.pad(total, padding).unflatten(-2, (-1, radix))
    position = torch.arange(radix, device=exponent.device)
    lag = (position[:, None] - position[None, :])[:, :, None]
    terms = (exponent[..., None, :, :] - lag * decay).masked_fill(lag < 0, -torch.inf)
    largest = terms.amax(-2).detach()
    factors = torch.exp(terms - largest[..., None, :])
    total = (factors * total[..., None, :, :]).sum(-2)
    if weight is None:
        weight = factors.sum(-2)
    else:
        weight = F.pad(weight, padding).unflatten(-2, (-1, radix))
        weight = (factors * weight[..., None, :, :]).sum(-2)

    if largest.shape[-3] > 1:
        before = _decayed_sums(
            largest[..., -1, :], total[..., -1, :], weight[..., -1, :], radix * decay
        )
        carried, carried_total, carried_weight = (
            _one_later(part, first)[..., None, :]
            for part, first in zip(before, (EMPTY, 0.0, 0.0), strict=True)
        )
        carried = carried - (position[:, None] + 1) * decay
        common = torch.maximum(largest, carried).detach()
        here, there = torch.exp(largest - common), torch.exp(carried - common)
        total = here * total + there * carried_total
        weight = here * weight + there * carried_weight
        largest = common
    return tuple(part.flatten(-3, -2)[..., :seq_len, :] for part in (largest, total, weight))  # pyright: ignore[reportReturnType]
