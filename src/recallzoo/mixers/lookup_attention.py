"""Lookup attention: a query sees only what followed the latest occurrences of its own key.

    S[t] = the m latest positions s <= t with key[s - 1] = key[t]
    y[t] = W_o sum over s in S[t] of a[t, s] v[s],    a[t] = softmax of q[t] . k[s] / sqrt(K)

The key is the token id, or with match="hash" a code of the hidden state, so that near matches
count. A copy needs nothing to be learnt: S[t] holds the tokens that followed the present one.
Scores choose among them; with `sink` they compete with a score of zero for nothing, so that a
query may decline, and y[t] = 0 where no head finds anything.

hash      Each head h has a code of its own, the signs of `hash_bits` linear maps C_h x, and so its
          own matches: states that differ in one code may agree in another. The maps are trained
          through the scores, to which tanh(C_h x[t]) . tanh(C_h x[s - 1]) / sqrt(hash_bits) is
          added: useful matches agree more, useless ones less, and signs follow. While training,
          logistic noise times `hash_noise` is added before the signs, so that states which ought
          to match do so now and then, and can learn to.

Source   Ours. The induction head of arXiv:2209.11895 as an operator; sorting by a hash as in
         Kitaev et al. 2020, arXiv:2001.04451, there in chunks of one size, so that a match may
         be missed: here the m latest are exact. Arora et al. 2023, arXiv:2312.04927, select rows
         by the same event (the token occurred earlier) and let them see everything.
State    kv: keys and values of every token, 2 D T, with match="hash" also its codes' numbers,
         H hash_bits T; index: the key of every token, T, or H T.
Cost     O(B T (m D + log T)): one sort, with match="hash" one for each head, then m products
         with shifted tensors; O(T D) memory.
Letters  B batch, T time, D width, H heads, K head width, m latest matches (num_latest), G groups
         of heads that share a key, C numbers of all codes.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import Cache, Context, Mixer, OptionValue, select_positions
from recallzoo.mixers._convolution import in_float32, linear_float32
from recallzoo.mixers._distinct_rows import distinct_rows
from recallzoo.mixers._occurrences import MAX_KEY_BITS, latest, occurrences


class LookupAttention(Mixer):
    """Attention to what followed the m latest equal keys.

    num_latest   matches that a query sees, m
    match        token: equal token ids; hash: equal codes of hidden states
    hash_bits    bits of a code; 2 ** hash_bits codes
    hash_noise   size of the noise before the bits while training
    num_heads    heads; those of match="hash" have codes of their own
    sink         whether a query may decline
    """

    name: ClassVar[str] = "lookup_attention"
    needs_tokens: ClassVar[bool] = True
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"num_latest": 1, "sink": False},
        {"num_latest": 6, "num_heads": 4, "bias": False},
        {"match": "hash", "hash_bits": 2, "num_latest": 3, "num_heads": 2},
        {"match": "hash", "hash_bits": 1, "num_latest": 2, "hash_noise": 0.0, "sink": False},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        num_latest: int = 4,
        match: Literal["token", "hash"] = "token",
        hash_bits: int | None = None,
        hash_noise: float | None = None,
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
        for option, value in (("hash_bits", hash_bits), ("hash_noise", hash_noise)):
            if match == "token" and value is not None:
                raise InvalidConfig(
                    f"lookup_attention.{option}={value} would be ignored with match='token'. "
                    f"Leave it out, or set match='hash'."
                )
        hash_bits = 8 if hash_bits is None else hash_bits
        hash_noise = 0.3 if hash_noise is None else hash_noise
        if not 1 <= hash_bits <= MAX_KEY_BITS:
            raise InvalidConfig(
                f"lookup_attention.hash_bits={hash_bits} must be between 1 and {MAX_KEY_BITS}."
            )
        if hash_noise < 0.0:
            raise InvalidConfig(f"lookup_attention.hash_noise={hash_noise} must be at least 0.")
        self.num_latest = num_latest
        self.hash_noise = hash_noise
        self.num_groups = num_heads if match == "hash" else 1
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.sink = sink
        self.needs_tokens = match == "token"  # pyright: ignore[reportAttributeAccessIssue]
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.hash = (
            nn.Linear(d_model, num_heads * hash_bits, bias=False) if match == "hash" else None
        )
        for linear in (self.qkv, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)
        if self.hash is not None:
            nn.init.normal_(self.hash.weight, std=d_model**-0.5)

    def _heads(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S H K"]:
        """Heads of all groups, or of one."""
        return x.unflatten(-1, (-1, self.head_dim))

    def _split(self, x: Shaped[Tensor, "B T X"]) -> Shaped[Tensor, "N T Y"]:
        """Groups of heads as rows of their own, N = B G."""
        return x.unflatten(-1, (self.num_groups, -1)).transpose(1, 2).flatten(0, 1)

    def _join(self, x: Shaped[Tensor, "N T Y"]) -> Shaped[Tensor, "B T X"]:
        """The inverse of `_split`."""
        return x.unflatten(0, (-1, self.num_groups)).transpose(1, 2).flatten(2)

    def _keys(
        self, x: Float[Tensor, "*S D"], context: Context
    ) -> tuple[Int[Tensor, "*S G"], Float[Tensor, "*S C"] | None]:
        """The key of each group that positions are looked up by, and the numbers whose signs make
        the keys, C = G hash_bits."""
        if self.hash is None:
            return context.token_ids(self.name, x.ndim - 1)[..., None], None
        with in_float32(x.device):
            code = linear_float32(x.float(), self.hash)
        bits = code
        if self.hash_noise and context.training:
            u = context.uniform(code)
            bits = code + self.hash_noise * torch.log(u / (1 - u))
        by_group = (bits > 0).unflatten(-1, (self.num_groups, -1))
        value = 2 ** torch.arange(by_group.shape[-1], device=x.device)
        return (by_group * value).sum(-1), torch.tanh(code)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        """In the order of (key, position), a position's latest matches are its neighbours to the
        left: lookup is a window of m there."""
        keys, code = self._keys(x, context)
        found = occurrences(self._split(keys)[..., 0])
        # The last position's entry gets the first row, and is no match of any.
        following = (found.position + 1) % x.shape[1]
        q, k, v = map(self._split, self.qkv(x).chunk(3, dim=-1))
        q, k, v = (
            distinct_rows(one, at)
            for one, at in ((q, found.position), (k, following), (v, following))
        )
        code = None if code is None else distinct_rows(self._split(code), found.position)
        num_latest = min(self.num_latest, max(x.shape[1] - 1, 1))
        shifted_k, shifted_v = _shifted(k, num_latest), _shifted(v, num_latest)
        shifted_code = None if code is None else _shifted(code, num_latest)
        scores = []
        for back in range(num_latest):
            score = (self._heads(q) * self._heads(shifted_k[back])).sum(-1) / self.head_dim**0.5
            if code is not None and shifted_code is not None:
                score = score + _agreement(code, shifted_code[back])[..., None].to(score.dtype)
            scores.append(score)
        back = torch.arange(1, num_latest + 1, device=x.device)
        exists = back <= found.place[..., None]
        weights = self._weights(torch.stack(scores, dim=-1), exists[..., None, :])
        y = torch.zeros_like(self._heads(v))
        for weight, value in zip(weights.to(v.dtype).unbind(-1), shifted_v, strict=True):
            y = y + weight[..., None] * self._heads(value)
        y = self._join(distinct_rows(y.flatten(-2), found.entry))
        matched = self._join(torch.gather(found.place > 0, 1, found.entry)[..., None])
        return self._finish(y, matched)

    def _weights(
        self, scores: Float[Tensor, "*S m"], exists: Bool[Tensor, "*#S m"]
    ) -> Float[Tensor, "*S m"]:
        """Softmax over the matches there are, and nothing where there is none."""
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(exists, scores, lowest)
        if self.sink:
            weights = torch.softmax(F.pad(scores, (0, 1)), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        return torch.where(exists, weights, 0.0)

    def _finish(
        self, y: Float[Tensor, "*S D"], matched: Bool[Tensor, "*S G"]
    ) -> Float[Tensor, "*S D"]:
        """The output map where any group has found something."""
        return torch.where(matched.any(-1, keepdim=True), self.out_proj(y), 0.0)

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        """By index: for each group [B, Q, m] keys and values are gathered."""
        keys, code = self._keys(x, context)
        weight, bias, D = self.qkv.weight, self.qkv.bias, self.d_model
        bias_q, bias_kv = (None, None) if bias is None else (bias[:D], bias[D:])
        q = self._split(F.linear(select_positions(x, positions), weight[:D], bias_q))
        k, v = map(self._split, F.linear(x, weight[D:], bias_kv).chunk(2, dim=-1))
        positions = self._split(positions[..., None].expand(-1, -1, self.num_groups))[..., 0]
        at, exists = latest(occurrences(self._split(keys)[..., 0]), positions, self.num_latest)
        following = (at.flatten(1) + 1).clamp(max=x.shape[1] - 1)
        k, v = (self._heads(_rows(one, following)).unflatten(1, at.shape[1:]) for one in (k, v))
        score = (self._heads(q)[:, :, None] * k).sum(-1) / self.head_dim**0.5
        if code is not None:
            code = self._split(code)
            code_k = _rows(code, at.flatten(1)).unflatten(1, at.shape[1:])
            agreement = _agreement(_rows(code, positions)[:, :, None], code_k)
            score = score + agreement[..., None].to(score.dtype)
        weights = self._weights(score.transpose(-1, -2), exists[:, :, None])
        y = (weights.transpose(-1, -2)[..., None] * v).sum(2)
        return self._finish(self._join(y.flatten(-2)), self._join(exists.any(-1, keepdim=True)))

    def init_cache(self, batch_size: int) -> Cache:
        weight = self.qkv.weight
        index = torch.zeros(batch_size, 0, self.num_groups, dtype=torch.int64, device=weight.device)
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
            by_group = (code[:, None] * earlier).unflatten(-1, (self.num_groups, -1))
            score = score + by_group.sum(-1) / math.sqrt(by_group.shape[-1])
            new["codes"] = {"kv": torch.cat([earlier, code[:, None].to(earlier.dtype)], dim=1)}
        by_head = seen.expand(-1, -1, self.num_heads).transpose(1, 2)
        weights = self._weights(score.transpose(1, 2), by_head)
        y = (weights.transpose(1, 2)[..., None] * v).sum(1)
        return self._finish(y.flatten(1), seen.any(1)), new


def _agreement(a: Float[Tensor, "*#S C"], b: Float[Tensor, "*S C"]) -> Float[Tensor, "*S"]:
    """Inner product of two codes, as scores are scaled."""
    return (a * b).sum(-1) / math.sqrt(a.shape[-1])


def _rows(x: Tensor, positions: Int[Tensor, "B Q"]) -> Tensor:
    return select_positions(x, positions)


def _shifted(x: Float[Tensor, "B T D"], most: int) -> list[Float[Tensor, "B T D"]]:
    """x moved to the right by 1, 2, ..., `most` rows, zeros before it: views of one tensor."""
    seq_len = x.shape[1]
    padded = F.pad(x, (0, 0, most, 0))
    return [padded[:, most - back : most - back + seq_len] for back in range(1, most + 1)]
