"""In-stream recall: pairs and queries interleaved, as in text.

    tokens    k1 v1 k2 v2 k1 v1  .  . k1 v1 k2 v2
    answers    -  -  -  - v1  -  -  - v1  - v2  -

An example is a stream of items of two tokens. The first occurrence of a key stores its value;
`num_repeats` later items repeat a key, which is a query, and the value follows in the input as
it does in text. Further items are filler. The first item is a pair; which of the others
store, repeat or fill is drawn uniformly. A repeat takes, among the keys stored so far, one
whose last occurrence is g items back with probability proportional to g ** (power - 1), the
law of the gap. Keys are different words of 1..V/2-1, values different words of V/2..V-1.

Source   ours. arXiv:2312.04927 asks for recall "as in text" and measures that the distance
         between repeated bigrams follows a power law (its Appendix D.1), but its synthetic
         task states the law for the distance from the end of all pairs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from recallzoo.random import RowRandom
from recallzoo.tasks._contract import Batch, Task, require
from recallzoo.tasks._layout import Filler, constant_slices, fill, power_law, require_positive

_FILL, _STORE, _REPEAT = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class InStream(Task):
    """Recall with pairs and queries interleaved."""

    name: ClassVar[str] = "in_stream"
    version: ClassVar[int] = 1

    num_pairs: int = 8
    """Different keys in an example, P."""
    num_repeats: int = 16
    """Items that repeat an earlier key, which are the queries, Q."""
    power: float = 0.01
    """Exponent of the gap law: 1 repeats all keys alike, near 0 mostly recent ones."""
    filler: Filler = "zero"
    """What the other items hold: zero, random, or random_colliding."""

    def validate(self) -> None:
        require_positive(
            "in_stream", num_pairs=self.num_pairs, num_repeats=self.num_repeats, power=self.power
        )
        needed = 2 * (self.num_pairs + self.num_repeats)
        require(
            self.seq_len % 2 == 0 and self.seq_len >= needed,
            f"in_stream.seq_len={self.seq_len} does not fit num_pairs={self.num_pairs} and "
            f"num_repeats={self.num_repeats}: each takes two tokens, so seq_len must be even and "
            f"at least {needed}. Raise seq_len or lower num_repeats.",
        )
        require(
            self.vocab_size >= 2 * self.num_pairs + 2,
            f"in_stream.vocab_size={self.vocab_size} is too small for num_pairs={self.num_pairs}: "
            f"keys and values take one half each, so it must be at least "
            f"{2 * self.num_pairs + 2}.",
        )

    @property
    def num_queries(self) -> int:
        return self.num_repeats

    def generate(self, random: RowRandom) -> Batch:
        half, pairs = self.vocab_size // 2, self.num_pairs
        keys = random.distinct("keys", 1, half, pairs)
        values = random.distinct("values", half, self.vocab_size, pairs)
        kind = self._kinds(random)
        pair, gap, occurrence = self._pairs(random, kind)

        rows, num_items = kind.shape
        tokens = torch.stack([keys.gather(1, pair), values.gather(1, pair)], dim=2)
        is_free = (kind == _FILL)[:, :, None].expand(rows, num_items, 2)
        tokens = fill(
            tokens.view(rows, self.seq_len),
            is_free.reshape(rows, self.seq_len),
            keys,
            filler=self.filler,
            vocab_size=self.vocab_size,
            random=random,
        )
        item = (kind == _REPEAT).nonzero()[:, 1].view(rows, self.num_repeats)
        num_stored = torch.cumsum(kind == _STORE, dim=1)
        return Batch(
            tokens=tokens,
            query_positions=2 * item,
            answers=values.gather(1, pair.gather(1, item)),
            slices={
                "distance": 2 * gap.gather(1, item),
                "occurrence": occurrence.gather(1, item),
                "num_stored": num_stored.gather(1, item),
                **constant_slices(item, num_pairs=pairs, seq_len=self.seq_len),
            },
        )

    def _kinds(self, random: RowRandom) -> Int[Tensor, "B S"]:
        """What each item does: the first stores, the others are in random order."""
        order = torch.argsort(random.bits("kinds", self.seq_len // 2 - 1), dim=1)
        kind = torch.zeros_like(order)
        kind[order < self.num_pairs - 1 + self.num_repeats] = _REPEAT
        kind[order < self.num_pairs - 1] = _STORE
        return torch.nn.functional.pad(kind, (1, 0), value=_STORE)

    def _pairs(
        self, random: RowRandom, kind: Int[Tensor, "B S"]
    ) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"], Int[Tensor, "B S"]]:
        """The pair in each item, its gap to the same pair before, in items, and how often it
        has occurred before; of no meaning where the item is filler."""
        rows, num_items = kind.shape
        device = random.device
        # Whole-number weights add up to the same sums on every device.
        log_weight = power_law(num_items, self.power)
        weight = torch.exp(log_weight - log_weight.max() + 40 * torch.log(torch.tensor(2.0)))
        weight = torch.nn.functional.pad(weight.round().long().clamp(min=1), (1, 0)).to(device)
        dice = random.integers("gaps", 0, 2**62, num_items)
        stored_here = torch.cumsum(kind == _STORE, dim=1) - 1
        last = torch.full((rows, self.num_pairs), -1, dtype=torch.int64, device=device)
        count = torch.zeros_like(last)
        pair, gap, occurrence = (torch.zeros_like(kind) for _ in range(3))
        for i in range(num_items):
            seen = last[:, : max(1, min(i, self.num_pairs))]
            upto = torch.where(seen >= 0, weight[i - seen.clamp(max=i)], 0).cumsum(dim=1)
            pick = dice[:, i] % upto[:, -1].clamp(min=1)
            repeated = (upto <= pick[:, None]).sum(dim=1).clamp(max=self.num_pairs - 1)
            chosen = torch.where(kind[:, i] == _STORE, stored_here[:, i], repeated)[:, None]
            before = last.gather(1, chosen)
            is_used = kind[:, i : i + 1] != _FILL
            pair[:, i] = chosen[:, 0]
            gap[:, i] = i - before[:, 0]
            occurrence[:, i] = count.gather(1, chosen)[:, 0]
            last.scatter_(1, chosen, torch.where(is_used, i, before))
            count.scatter_add_(1, chosen, is_used.long())
        return pair, gap, occurrence
