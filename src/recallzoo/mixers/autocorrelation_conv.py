"""Autocorrelation convolution: spikes at the lags at which the sequence resembles itself most.

    r[t, s] = sum over i <= t of match(i, i - s),   for lags 1 <= s <= max_lag
    S[t] = the `num_lags` lags of the largest r[t, s] > 0, the shorter one where they are equal
    c[t] = mean over s in S[t] of u[t - (s - 1)]
    y[t] = (W u[t] + b1) * (c[t] + b2)

match is equality of tokens (match="token"), or the inner product of hidden states of unit length
("hidden"). The statistic runs over the prefix, so the filter at t is what a decoder knows at t.

The lags that repeat most need not be those that a query needs: a lag that answers it may be seen
once, in the query itself, and a run of equal values has more matches at lags of no use.
`shift_conv` asks for the lags of the present token instead.

Source   Arora et al. 2023, arXiv:2312.04927: input-dependent filters from the autocorrelation.
Differs  There the autocorrelation is that of the whole sequence, which the authors note is not
         causal. With as many lags as there are, this is the paper's programmatic filter (a spike
         at each lag where tokens repeat) made causal.
State    conv: all inputs, D T; index: tokens, T, and a count for each lag, max_lag (match="token");
         matrix: a sum for each lag, max_lag (match="hidden").
Cost     O(B T max_lag log max_lag), for match="hidden" O(B T D max_lag); O(B T D num_lags).
Letters  B batch, T time, D width, L lags looked at.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import Cache, Context, OptionValue, select_positions
from recallzoo.mixers._convolution import in_float32
from recallzoo.mixers._shifts import ShiftFilter, tensor_of

MOST_IN_TURN = 16
"""Lags that are found one after another on a GPU; more are sought together."""


class AutocorrelationConv(ShiftFilter):
    """BaseConv with spikes at the top lags of the running autocorrelation (arXiv:2312.04927).

    num_lags   spikes of the filter, at most
    max_lag    longest lag looked at, in tokens
    match      token: equal token ids; hidden: inner products of hidden states
    """

    name: ClassVar[str] = "autocorrelation_conv"
    needs_tokens: ClassVar[bool] = True
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"num_lags": 1, "max_lag": 5},
        {"match": "hidden", "num_lags": 3},
        {"match": "hidden", "num_lags": 40, "max_lag": 3},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        num_lags: int = 8,
        max_lag: int = 512,
        match: Literal["token", "hidden"] = "token",
    ) -> None:
        super().__init__(d_model, max_seq_len)
        for option, value in (("num_lags", num_lags), ("max_lag", max_lag)):
            if value < 1:
                raise InvalidConfig(f"autocorrelation_conv.{option}={value} must be at least 1.")
        if match not in ("token", "hidden"):
            raise InvalidConfig(
                f"autocorrelation_conv.match={match!r} must be 'token' or 'hidden'."
            )
        self.max_lag = max(1, min(max_lag, max_seq_len - 1))
        self.num_lags = min(num_lags, self.max_lag)
        self.match = match
        self.needs_tokens = match == "token"  # pyright: ignore[reportAttributeAccessIssue]

    def convolve(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        scores = self.autocorrelation(x, context)
        lags, is_spike = self._top(scores)
        position = torch.arange(x.shape[1], device=x.device)[:, None]
        source = torch.where(is_spike, position - lags + 1, 0)
        weight = is_spike / is_spike.sum(-1, keepdim=True).clamp(min=1)
        c = torch.zeros_like(x, dtype=torch.float32)
        for one, share in zip(source.unbind(-1), weight.unbind(-1), strict=True):
            c = c + share[..., None] * select_positions(x.float(), one)
        return c

    def autocorrelation(
        self, x: Float[Tensor, "B T D"], context: Context
    ) -> Float[Tensor, "B T L"] | Int[Tensor, "B T L"]:
        """r, [B, T, L]: entry [t, s - 1] is the running score of lag s."""
        if self.match == "hidden":
            return torch.cumsum(_products(_unit(x), self.max_lag), dim=1)
        tokens = context.token_ids(self.name, 2)
        # Windows of the L tokens before each position, the latest last; -1 equals no token.
        before = F.pad(tokens, (self.max_lag, 0), value=-1)[:, :-1].unfold(1, self.max_lag, 1)
        return torch.cumsum((before == tokens[..., None]).flip(-1), dim=1, dtype=torch.int32)

    def _top(self, scores: Tensor) -> tuple[Int[Tensor, "*S N"], Bool[Tensor, "*S N"]]:
        """The lags of the largest scores and which of them are above zero."""
        if scores.is_floating_point():
            best = torch.topk(scores, self.num_lags, dim=-1)
            return best.indices + 1, best.values > 0
        shorter = torch.arange(self.max_lag, device=scores.device, dtype=scores.dtype).flip(0)
        rank = scores * self.max_lag + shorter
        best = _largest(rank, self.num_lags)
        return self.max_lag - best % self.max_lag, best >= self.max_lag

    def init_cache(self, batch_size: int) -> Cache:
        conv = self.bias.new_zeros(batch_size, 0, self.d_model)
        if self.match == "hidden":
            matrix = torch.zeros(batch_size, self.max_lag, device=conv.device)
            return {"conv": conv, "matrix": matrix}
        index = torch.zeros(batch_size, 0, dtype=torch.int64, device=conv.device)
        return {
            "conv": conv,
            "index": index,
            "counts": {"index": index.new_zeros(batch_size, self.max_lag, dtype=torch.int32)},
        }

    def convolve_step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        inputs = torch.cat([tensor_of(cache, "conv"), x_t[:, None]], dim=1)
        new: Cache = {"conv": inputs}
        if self.match == "hidden":
            unit = _unit(inputs)
            matches = (unit[:, :-1] * unit[:, -1:]).sum(-1).flip(1)[:, : self.max_lag]
            missing = self.max_lag - matches.shape[1]
            scores = new["matrix"] = tensor_of(cache, "matrix") + F.pad(matches, (0, missing))
        else:
            seen, token = tensor_of(cache, "index"), context.token_ids(self.name, 1)
            counts = cache["counts"]
            assert isinstance(counts, dict)
            matches = (seen == token[:, None]).flip(1)[:, : self.max_lag].int()
            missing = self.max_lag - matches.shape[1]
            scores = tensor_of(counts, "index") + F.pad(matches, (0, missing))
            new["index"] = torch.cat([seen, token[:, None]], dim=1)
            new["counts"] = {"index": scores}
        lags, is_spike = self._top(scores)
        source = torch.where(is_spike, inputs.shape[1] - lags, 0)
        found = select_positions(inputs.float(), source)
        weight = is_spike / is_spike.sum(-1, keepdim=True).clamp(min=1)
        return (weight[..., None] * found).sum(1), new


def _largest(rank: Int[Tensor, "*S L"], number: int) -> Int[Tensor, "*S N"]:
    """The largest of numbers that all differ and are not negative, in falling order.

    On a GPU a few are found each below the one before: compiled, that reads the numbers once, where
    a radix select passes over them for every few bits. On a CPU it takes twice as long.
    """
    if rank.is_cuda and number <= MOST_IN_TURN:
        return _largest_in_turn(rank, number)
    return torch.topk(rank, number, dim=-1).values


def _largest_in_turn(rank: Int[Tensor, "*S L"], number: int) -> Int[Tensor, "*S N"]:
    """The same without a sort."""
    found = [rank.amax(-1, keepdim=True)]
    while len(found) < number:
        found.append(torch.where(rank < found[-1], rank, -1).amax(-1, keepdim=True))
    return torch.cat(found, dim=-1)


def _unit(x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Hidden states scaled to unit length, in float32; no gradient passes, as none would pass the
    choice of lags."""
    return F.normalize(x.detach().float(), dim=-1)


def _products(x: Float[Tensor, "B T D"], num_lags: int) -> Float[Tensor, "B T L"]:
    """x[t] . x[t - s] for lags s = 1..L, zero before the first token: in blocks of L positions,
    each against itself and the block before."""
    seq_len, block = x.shape[1], num_lags
    blocks = F.pad(x, (0, 0, 0, -seq_len % block)).unflatten(1, (-1, block))
    before = F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1]
    with in_float32(x.device):
        products = blocks @ torch.cat([before, blocks], dim=2).transpose(-1, -2)
    row = torch.arange(block, device=x.device)[:, None]
    lag = torch.arange(1, num_lags + 1, device=x.device)
    at = (row + block - lag).expand(products.shape[0], products.shape[1], -1, -1)
    return torch.gather(products, 3, at).flatten(1, 2)[:, :seq_len]
