"""Lookup attention: a query sees only what followed the latest occurrences of its own key.

    S[t] = the m latest positions s <= t with key[s - 1] = key[t]
    y[t] = W_o sum over s in S[t] of a[t, s] v[s],    a[t] = softmax of q[t] . k[s] / sqrt(K)

The key is the token id, or with match="hash" a code of the hidden state: the signs of `hash_bits`
linear maps of it, so that near matches count. A copy needs nothing to be learnt: S[t] holds the
tokens that followed the present one. Scores choose among them; with `sink` they compete with a
score of zero for nothing, so that a query may decline, and y[t] = 0 where S[t] is empty.

hash      The maps C are trained through the scores, to which tanh(C x[t]) . tanh(C x[s - 1])
          / sqrt(hash_bits) is added: the agreement of codes that are equal already. The codes
          follow, as the signs of the same numbers.

Source   Ours. The induction head of arXiv:2209.11895 as an operator; sorting by a hash as in
         Kitaev et al. 2020, arXiv:2001.04451, there in chunks of one size, so that a match may
         be missed: here the m latest are exact. Arora et al. 2023, arXiv:2312.04927, select rows
         by the same event (the token occurred earlier) and let them see everything.
State    kv: keys and values of every token, 2 D T (and its code's numbers, hash_bits T); index:
         the key of every token, T.
Cost     O(B T (m D + log T)): one sort, then m products with shifted tensors; O(T D) memory.
Letters  B batch, T time, D width, H heads, K head width, m latest matches (num_latest).
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import Cache, Context, Mixer, OptionValue, select_positions
from recallzoo.mixers._convolution import in_float32, linear_float32
from recallzoo.mixers._occurrences import MAX_KEY_BITS, Occurrences, latest, occurrences


class LookupAttention(Mixer):
    """Attention to what followed the m latest equal keys.

    num_latest   matches that a query sees, m
    match        token: equal token ids; hash: equal codes of hidden states
    hash_bits    bits of a code; 2 ** hash_bits codes
    num_heads    heads, which share matches and weigh them apart
    sink         whether a query may decline
    """

    name: ClassVar[str] = "lookup_attention"
    needs_tokens: ClassVar[bool] = True
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"num_latest": 1, "sink": False},
        {"num_latest": 40, "num_heads": 4, "bias": False},
        {"match": "hash", "hash_bits": 2, "num_latest": 3, "num_heads": 2},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        num_latest: int = 4,
        match: Literal["token", "hash"] = "token",
        hash_bits: int | None = None,
        num_heads: int = 1,
        sink: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, max_seq_len)
        if num_latest < 1:
            raise InvalidConfig(
                f"lookup_attention.num_latest={num_latest} must be at least 1: a query that sees "
                f"no match computes nothing."
            )
        if num_heads < 1 or d_model % num_heads:
            raise InvalidConfig(
                f"lookup_attention.num_heads={num_heads} does not divide d_model={d_model}."
            )
        if match not in ("token", "hash"):
            raise InvalidConfig(f"lookup_attention.match={match!r} must be 'token' or 'hash'.")
        if match == "token" and hash_bits is not None:
            raise InvalidConfig(
                f"lookup_attention.hash_bits={hash_bits} would be ignored with match='token'. "
                f"Leave it out, or set match='hash'."
            )
        hash_bits = 8 if hash_bits is None else hash_bits
        if not 1 <= hash_bits <= MAX_KEY_BITS:
            raise InvalidConfig(
                f"lookup_attention.hash_bits={hash_bits} must be between 1 and {MAX_KEY_BITS}."
            )
        self.num_latest = num_latest
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.sink = sink
        self.needs_tokens = match == "token"  # pyright: ignore[reportAttributeAccessIssue]
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.hash = nn.Linear(d_model, hash_bits, bias=False) if match == "hash" else None
        for linear in (self.qkv, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)
        if self.hash is not None:
            nn.init.normal_(self.hash.weight, std=d_model**-0.5)

    def _heads(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S H K"]:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _keys(
        self, x: Float[Tensor, "*S D"], context: Context
    ) -> tuple[Int[Tensor, "*S"], Float[Tensor, "*S C"] | None]:
        """The key that positions are looked up by, and the numbers whose signs it is."""
        if self.hash is None:
            return context.token_ids(self.name, x.ndim - 1), None
        with in_float32(x.device):
            code = torch.tanh(linear_float32(x.float(), self.hash))
        bit = 2 ** torch.arange(code.shape[-1], device=x.device)
        return ((code > 0) * bit).sum(-1), code

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        """In the order of (key, position), a position's latest matches are its neighbours to the
        left: lookup is a window of m there."""
        keys, code = self._keys(x, context)
        found = occurrences(keys)
        following = (found.position + 1).clamp(max=x.shape[1] - 1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, code_q = _rows(q, found.position), _rows(code, found.position)
        k, v = _rows(k, following), _rows(v, following)
        num_latest = min(self.num_latest, max(x.shape[1] - 1, 1))
        shifted_k, shifted_v = _shifted(k, num_latest), _shifted(v, num_latest)
        shifted_code = [] if code_q is None else _shifted(code_q, num_latest)
        scores = []
        for back in range(num_latest):
            score = (self._heads(q) * self._heads(shifted_k[back])).sum(-1) / self.head_dim**0.5
            scores.append(self._agree(score, code_q, shifted_code[back] if shifted_code else None))
        back = torch.arange(1, num_latest + 1, device=x.device)
        exists = back <= found.place[..., None]
        weights = self._weights(torch.stack(scores, dim=-1), exists[..., None, :])
        y = torch.zeros_like(self._heads(v))
        for weight, value in zip(weights.to(v.dtype).unbind(-1), shifted_v, strict=True):
            y = y + weight[..., None] * self._heads(value)
        y = _rows(y.flatten(-2), found.entry)
        return torch.where(self._any_match(found)[..., None], self.out_proj(y), 0.0)

    def _any_match(self, found: Occurrences) -> Bool[Tensor, "B T"]:
        return torch.gather(found.place > 0, 1, found.entry)

    def _agree(self, score: Tensor, code_q: Tensor | None, code_k: Tensor | None) -> Tensor:
        """Scores, [..., H], with the agreement of two codes, [..., C], where there are codes."""
        if code_q is None or code_k is None:
            return score
        agreement = (code_q * code_k).sum(-1) / math.sqrt(code_q.shape[-1])
        return score + agreement[..., None].to(score.dtype)

    def _weights(
        self, scores: Float[Tensor, "*S m"], exists: Bool[Tensor, "*S m"]
    ) -> Float[Tensor, "*S m"]:
        """Softmax over the matches there are, and nothing where there is none."""
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(exists, scores, lowest)
        if self.sink:
            weights = torch.softmax(F.pad(scores, (0, 1)), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        return torch.where(exists, weights, 0.0)

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        """By index: [B, Q, m] keys and values are gathered."""
        keys, code = self._keys(x, context)
        at, exists = latest(occurrences(keys), positions, self.num_latest)
        weight, bias, D = self.qkv.weight, self.qkv.bias, self.d_model
        bias_q, bias_kv = (None, None) if bias is None else (bias[:D], bias[D:])
        q = self._heads(F.linear(select_positions(x, positions), weight[:D], bias_q))
        kv = F.linear(x, weight[D:], bias_kv)
        found = _rows(kv, (at.flatten(1) + 1).clamp(max=x.shape[1] - 1)).unflatten(1, at.shape[1:])
        k, v = map(self._heads, found.chunk(2, dim=-1))
        score = (q[:, :, None] * k).sum(-1) / self.head_dim**0.5
        if code is not None:
            code_k = _rows(code, at.flatten(1)).unflatten(1, at.shape[1:])
            score = self._agree(score, _rows(code, positions)[:, :, None], code_k)
        weights = self._weights(score.transpose(-1, -2), exists[:, :, None])
        y = (weights.transpose(-1, -2)[..., None] * v).sum(2)
        return torch.where(exists.any(-1, keepdim=True), self.out_proj(y.flatten(-2)), 0.0)

    def init_cache(self, batch_size: int) -> Cache:
        weight = self.qkv.weight
        index = torch.zeros(batch_size, 0, dtype=torch.int64, device=weight.device)
        cache: Cache = {"kv": weight.new_zeros(batch_size, 0, 2, self.d_model), "index": index}
        if self.hash is not None:
            cache["codes"] = {"kv": weight.new_zeros(batch_size, 0, self.hash.out_features)}
        return cache

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        past, index = cache["kv"], cache["index"]
        assert isinstance(past, Tensor)
        assert isinstance(index, Tensor)
        key, code = self._keys(x_t, context)
        q, k, v = self.qkv(x_t).chunk(3, dim=-1)
        kv = torch.cat([past, torch.stack([k, v], dim=1)[:, None]], dim=1)
        new: Cache = {"kv": kv, "index": torch.cat([index, key[:, None]], dim=1)}
        # Position s = j + 1 is seen if position j held the key and is among the m latest that did.
        matches = index == key[:, None]
        later = matches.flip(1).cumsum(1).flip(1)
        seen = matches & (later <= self.num_latest)
        k, v = map(self._heads, kv[:, 1:].unbind(2))
        score = (self._heads(q)[:, None] * k).sum(-1) / self.head_dim**0.5
        if code is not None:
            codes = cache["codes"]
            assert isinstance(codes, dict)
            earlier = codes["kv"]
            assert isinstance(earlier, Tensor)
            score = self._agree(score, code[:, None], earlier)
            new["codes"] = {"kv": torch.cat([earlier, code[:, None].to(earlier.dtype)], dim=1)}
        weights = self._weights(score.transpose(1, 2), seen[:, None])
        y = (weights.transpose(1, 2)[..., None] * v).sum(1)
        return torch.where(seen.any(1, keepdim=True), self.out_proj(y.flatten(1)), 0.0), new


def _rows(x: Tensor | None, positions: Int[Tensor, "B Q"]) -> Tensor:
    return None if x is None else select_positions(x, positions)  # pyright: ignore[reportReturnType]


def _shifted(x: Float[Tensor, "B T D"], most: int) -> list[Float[Tensor, "B T D"]]:
    """x moved to the right by 1, 2, ..., `most` rows, zeros before it: views of one tensor."""
    seq_len = x.shape[1]
    padded = F.pad(x, (0, 0, most, 0))
    return [padded[:, most - back : most - back + seq_len] for back in range(1, most + 1)]
