"""Which rows (queries) of a sequence attend: the selectors of selective attention.

A selector says it of all positions at once (`forward`) and token by token (`step`); the causal
ones say the same. `capacity` bounds the number of rows a sequence can have selected, so that they
can be gathered into a tensor of fixed size: no row that a selector selects is ever left out.

Letters   B batch, T time, D width.
"""

from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recallzoo.mixers._contract import Cache, Context, ParameterRule
from recallzoo.mixers._convolution import in_float32, linear_float32
from recallzoo.mixers._occurrences import is_repeated
from recallzoo.random import mix64, seed_of

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


@dataclass(frozen=True)
class Selection:
    """The rows selected in every sequence of a batch."""

    rows: Bool[Tensor, "B T"]
    capacity: int
    """No sequence has more rows than this."""
    weight: Float[Tensor, "B T"] | None = None
    """f(u), by which a selected row's output is multiplied; None: 1."""
    num_wanted: Int[Tensor, "B"] | None = None
    """Rows above the threshold; those beyond `capacity` are not selected. None: no such limit."""


class Selector(nn.Module):
    """Base class."""

    needs_tokens: bool = False
    name: str = ""

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Selection:
        """The rows of all positions."""
        raise NotImplementedError

    def init_cache(self, batch_size: int, device: torch.device) -> Cache:
        """What `step` needs to know of the past, before the first token."""
        raise NotImplementedError

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Bool[Tensor, "B"], Float[Tensor, "B"] | None, Cache]:
        """Whether the next position is selected, its weight, and the new cache."""
        raise NotImplementedError

    def parameter_rules(self) -> dict[str, ParameterRule]:
        return {}


class Repeated(Selector):
    """Rows whose token occurred earlier: x[j] = x[i] for some j < i."""

    needs_tokens = True
    name = "selective_attention(selector='repeated')"

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Selection:
        return Selection(is_repeated(context.token_ids(self.name, 2)), capacity=x.shape[1])

    def init_cache(self, batch_size: int, device: torch.device) -> Cache:
        return {"index": torch.zeros(batch_size, 0, dtype=torch.int64, device=device)}

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Bool[Tensor, "B"], None, Cache]:
        token, seen = context.token_ids(self.name, 1), cache["index"]
        assert isinstance(seen, Tensor)
        is_selected = (seen == token[:, None]).any(1)
        return is_selected, None, {"index": torch.cat([seen, token[:, None]], dim=1)}


class Random(Selector):
    """Each row with probability `rate`, independently.

    The draw is a hash of the tokens up to the row, its position and the seed: other sequences
    have other rows, and equal prefixes have equal rows, whatever the batch and the epoch.
    """

    needs_tokens = True
    name = "selective_attention(selector='random')"

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__()
        self.rate = rate
        self.seed = seed_of("selected rows", seed)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Selection:
        tokens = context.token_ids(self.name, 2)
        position = torch.arange(x.shape[1], device=x.device)
        prefix = torch.cumsum(self._hash(tokens, position), dim=1)
        return Selection(self._draw(prefix), capacity=x.shape[1])

    def _hash(self, token: Int[Tensor, "*S"], position: Int[Tensor, "..."]) -> Int[Tensor, "*S"]:
        # The seed by xor, not by addition: the compiler takes sums and products of positions for
        # 32-bit addresses, which these constants exceed.
        return mix64(mix64((position ^ self.seed) * _GOLDEN) + token)

    def _draw(self, prefix: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
        return ((mix64(prefix) >> 11) & (2**53 - 1)) < round(self.rate * 2**53)

    def init_cache(self, batch_size: int, device: torch.device) -> Cache:
        return {"index": torch.zeros(batch_size, 2, dtype=torch.int64, device=device)}

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Bool[Tensor, "B"], None, Cache]:
        past = cache["index"]
        assert isinstance(past, Tensor)
        prefix, position = past.unbind(1)
        prefix = prefix + self._hash(context.token_ids(self.name, 1), position)
        return self._draw(prefix), None, {"index": torch.stack([prefix, position + 1], dim=1)}


class _Gated(Selector):
    """f(u) = sigmoid(u . W), kept near k rows by the auxiliary loss max(0, sum f - k) / T."""

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        num_rows: int,
        noise: float,
        auxiliary_weight: float,
    ) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.share = min(1.0, num_rows / max_seq_len)
        self.noise = noise
        self.auxiliary_weight = auxiliary_weight
        self.gate = nn.Linear(d_model, 1, bias=False)
        nn.init.normal_(self.gate.weight, std=d_model**-0.5)

    def logits(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S"]:
        """u . W in float32: its rank among others decides, and bfloat16 would make ties."""
        with in_float32(x.device):
            return linear_float32(x.float(), self.gate)[..., 0]

    def noisy(self, logits: Float[Tensor, "B T"], context: Context) -> Float[Tensor, "B T"]:
        """With logistic noise while training, so that rows near the limit take turns."""
        if self.noise == 0.0 or not context.training:
            return logits
        u = context.uniform(logits)
        return logits + self.noise * torch.log(u / (1 - u))

    def add_auxiliary_loss(self, f: Float[Tensor, "B T"], budget: float, context: Context) -> None:
        excess = torch.relu(f.sum(1) - budget).mean() / f.shape[1]
        context.add_loss("selection", self.auxiliary_weight * excess)


class TopK(_Gated):
    """The k rows of the largest f in the whole sequence: not causal."""

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Selection:
        seq_len = x.shape[1]
        capacity = min(self.num_rows, seq_len)
        logits = self.logits(x)
        f = torch.sigmoid(logits)
        chosen = torch.topk(self.noisy(logits, context), capacity, dim=1).indices
        rows = torch.zeros_like(logits, dtype=torch.bool)
        rows = rows.scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
        self.add_auxiliary_loss(f, self.num_rows, context)
        return Selection(rows, capacity, f)


class Threshold(_Gated):
    """Rows whose logit exceeds a threshold, up to `capacity` of them, the earliest first.

    The threshold is a parameter that a controller keeps on budget: while training its gradient is
    wanted share minus share above it, so it rises where too many rows are above, and falls
    where too few are. It is one number once trained, so `step` needs nothing but a count.
    """

    threshold_learning_rate = 0.01
    """Logits a step that the threshold may move, under an optimiser that normalises gradients."""

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        num_rows: int,
        noise: float,
        auxiliary_weight: float,
        burst: float,
    ) -> None:
        super().__init__(d_model, max_seq_len, num_rows, noise, auxiliary_weight)
        self.limit = min(max_seq_len, round(num_rows * burst))
        start = NormalDist().inv_cdf(1 - min(max(self.share, 1e-6), 1 - 1e-6))
        self.threshold = nn.Parameter(torch.tensor(start))

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Selection:
        seq_len = x.shape[1]
        logits = self.logits(x)
        f = torch.sigmoid(logits)
        above = self._is_above(self.noisy(logits, context))
        place = torch.cumsum(above, dim=1)
        if context.training:
            self.add_auxiliary_loss(f, self.share * seq_len, context)
            too_few = self.share - above.to(f.dtype).mean()
            context.add_loss("selection", self.threshold.float() * too_few)
        return Selection(above & (place <= self.limit), min(self.limit, seq_len), f, place[:, -1])

    def _is_above(self, logits: Float[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
        if self.share == 1.0:
            return torch.ones_like(logits, dtype=torch.bool)
        return logits > self.threshold

    def init_cache(self, batch_size: int, device: torch.device) -> Cache:
        return {"index": torch.zeros(batch_size, 1, dtype=torch.int64, device=device)}

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Bool[Tensor, "B"], Float[Tensor, "B"], Cache]:
        count = cache["index"]
        assert isinstance(count, Tensor)
        logits = self.logits(x_t)
        is_above = self._is_above(logits)
        is_selected = is_above & (count[:, 0] < self.limit)
        return is_selected, torch.sigmoid(logits), {"index": count + is_above[:, None]}

    def parameter_rules(self) -> dict[str, ParameterRule]:
        return {"threshold": ParameterRule(False, self.threshold_learning_rate)}
