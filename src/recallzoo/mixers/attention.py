"""Causal softmax attention.

    y[t] = W_o concat_h( sum over s <= t of softmax_s(q[t] . k[s] / sqrt(K)) v[s] )

Source   Vaswani et al. 2017, arXiv:1706.03762; HazyResearch/zoology at dbcb60d,
         zoology/mixers/attention.py: one head by default, one packed projection to q, k, v.
Differs  The reference masks with -10000, here the future has weight zero exactly.
State    kv: keys and values of every token, 2 D T elements.
Cost     O(B T^2 D).
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import _rotary_heads
from recallzoo.mixers._contract import Cache, Context, Mixer, OptionValue, select_positions
from recallzoo.mixers._rotary import rotate
from recallzoo.mixers._short_attention import is_fused, short_attention
from recallzoo.mixers._softmax import PLAIN_MAX_SEQ_LEN, attend, attend_at, read_at


class Attention(Mixer):
    """Multi-head causal softmax attention (arXiv:1706.03762)."""

    name: ClassVar[str] = "attention"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"num_heads": 4},
        {"num_heads": 2, "positions": "rotary", "bias": False},
        {"positions": "rotary", "rotary_fraction": 0.5, "dropout": 0.3},
    )
    window: int | None = None

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        num_heads: int = 1,
        positions: Literal["none", "rotary"] = "none",
        rotary_fraction: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_model, max_seq_len)
        if num_heads < 1 or d_model % num_heads:
            raise InvalidConfig(
                f"{self.name}.num_heads={num_heads} does not divide d_model={d_model}."
            )
        if not 0.0 <= dropout < 1.0:
            raise InvalidConfig(f"{self.name}.dropout={dropout} must be in [0, 1).")
        if positions not in ("none", "rotary"):
            raise InvalidConfig(
                f"{self.name}.positions={positions!r} must be 'none' or 'rotary'; learned "
                f"positions belong to the model (position='learned')."
            )
        if positions == "none" and rotary_fraction != 1.0:
            raise InvalidConfig(
                f"{self.name}.rotary_fraction={rotary_fraction} would be ignored with "
                f"positions='none'. Leave it out, or set positions='rotary'."
            )
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.rotary_dim = 2 * int(self.head_dim * rotary_fraction / 2) * (positions == "rotary")
        if positions == "rotary" and not 0 < self.rotary_dim <= self.head_dim:
            raise InvalidConfig(
                f"{self.name}.rotary_fraction={rotary_fraction} of head width {self.head_dim} "
                f"turns {self.rotary_dim} channels; between 2 and {self.head_dim} are wanted."
            )
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        for linear in (self.qkv, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)

    def _heads(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T K"]:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-2, -3)

    def _apart(
        self, qkv: Float[Tensor, "B T E"]
    ) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T K"], Float[Tensor, "B H T K"]]:
        """q, k, v before rotation, from the packed projection."""
        q, k, v = qkv.chunk(3, dim=-1)
        return self._heads(q), self._heads(k), self._heads(v)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        is_short = self.window is None and self.rotary_dim == 0 and x.shape[1] <= PLAIN_MAX_SEQ_LEN
        if is_short and is_fused(x, self.head_dim):
            # The bias is added in the kernel. Mapped over runs, a sum with it would be float32.
            qkv = F.linear(x, self.qkv.weight)
            y = short_attention(qkv, self.qkv.bias, self.num_heads, context, self.dropout)
            out = F.linear(y, self.out_proj.weight)
            return out if self.out_proj.bias is None else out + self.out_proj.bias.to(out.dtype)
        qkv = self.qkv(x)
        if _rotary_heads.is_fused(qkv, self.head_dim, self.rotary_dim):
            q, k, v = _rotary_heads.turned_heads(qkv, self.num_heads, self.rotary_dim)
        else:
            q, k, v = self._apart(qkv)
            position = torch.arange(x.shape[1], device=x.device)
            q, k = rotate(q, position, self.rotary_dim), rotate(k, position, self.rotary_dim)
        y = attend(q, k, v, context, window=self.window, dropout=self.dropout)
        return self.out_proj(y.transpose(-2, -3).flatten(-2))

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        weight, bias, D = self.qkv.weight, self.qkv.bias, self.d_model
        bias_q, bias_kv = (None, None) if bias is None else (bias[:D], bias[D:])
        q = self._heads(F.linear(select_positions(x, positions), weight[:D], bias_q))
        if self._is_read_from_inputs(positions.shape[1], x.shape[1]):
            key_map, value_map = weight[D:].view(2, self.num_heads, self.head_dim, D).unbind()
            bias_v = None if bias is None else bias[2 * D :].view(self.num_heads, self.head_dim)
            maps = key_map, value_map, bias_v
            y = read_at(q, x, *maps, positions, context, window=self.window, dropout=self.dropout)
        else:
            k, v = map(self._heads, F.linear(x, weight[D:], bias_kv).chunk(2, dim=-1))
            q = rotate(q, positions[:, None, :], self.rotary_dim)
            k = rotate(k, torch.arange(x.shape[1], device=x.device), self.rotary_dim)
            y = attend_at(q, k, v, positions, context, window=self.window, dropout=self.dropout)
        return self.out_proj(y.transpose(-2, -3).flatten(-2))

    def _is_read_from_inputs(self, num_queries: int, seq_len: int) -> bool:
        """Whether keys and values need not be made: multiplications with and without them. Rotated
        keys must be."""
        D, H = self.d_model, self.num_heads
        with_them = D * D * seq_len + D * num_queries * seq_len
        without = D * D * num_queries + H * D * num_queries * seq_len
        return self.rotary_dim == 0 and without < with_them

    def init_cache(self, batch_size: int) -> Cache:
        weight = self.qkv.weight
        return {"kv": weight.new_zeros(batch_size, 2, self.num_heads, 0, self.head_dim)}

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        past = cache["kv"]
        assert isinstance(past, Tensor)
        q, k, v = self._apart(self.qkv(x_t[:, None]))
        kv = torch.cat([past, torch.stack([k, v], dim=1)], dim=3)
        if self.window is not None:
            kv = kv[:, :, :, -self.window :]
        # Keys are kept unrotated: scores depend on distances alone, so positions may be counted
        # from the oldest key kept, and a window needs no counter in its cache.
        position = torch.arange(kv.shape[3], device=x_t.device)
        q = rotate(q, position[-1:], self.rotary_dim)
        keys, values = rotate(kv[:, 0], position, self.rotary_dim), kv[:, 1]
        scores = (q * keys).sum(-1, keepdim=True) / self.head_dim**0.5
        y = (torch.softmax(scores, dim=2) * values).sum(2)
        return self.out_proj(y.flatten(1)), {"kv": kv}
