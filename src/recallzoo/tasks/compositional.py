"""Compositional recall: two keys together name a value, and neither alone does.

    tokens    a1 b1 v1 a2 b1 v2 a1 b2 v3 a2 b2 v4 | a1 b2  . a2 b1  . a1 b1  . a2 b2  .
    answers    -  -  -  -  -  -  -  -  -  -  -  - |  - v3  -  - v2  -  - v1  -  - v4  -

Every one of `num_first` first keys is stored with every one of `num_second` second keys, in
random order, each time with another value; so what follows one key takes as many values as
there are other keys. First keys, second keys and values are different words of one third of
the vocabulary each. A query stands at slot r = 1, 2, ... after the pairs, three tokens each,
drawn as in mqar; the answer is asked at the second key.

Source   HazyResearch/zoology at dbcb60d, zoology/data/compositional_mqar.py.
Differs  The grid need not be square, and the length need not be even.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from recallzoo.random import RowRandom
from recallzoo.tasks._contract import Batch, Task, require
from recallzoo.tasks._layout import Filler, constant_slices, fill, power_law, require_positive


@dataclass(frozen=True, kw_only=True)
class Compositional(Task):
    """Recall by two keys (HazyResearch/zoology, compositional_mqar)."""

    name: ClassVar[str] = "compositional"
    version: ClassVar[int] = 1

    num_first: int = 2
    """Different first keys; the pairs stored and asked are num_first * num_second."""
    num_second: int = 2
    """Different second keys."""
    power: float = 0.01
    """Exponent of the slot law: 1 asks everywhere alike, near 0 mostly soon after the pairs."""
    filler: Filler = "zero"
    """What stands between queries: zero, random, or random_colliding."""

    def validate(self) -> None:
        require_positive("compositional", power=self.power)
        for name, size in (("num_first", self.num_first), ("num_second", self.num_second)):
            require(
                size >= 2,
                f"compositional.{name}={size} must be at least 2, or the other key alone would "
                f"name the value; mqar has single keys.",
            )
        pairs, third = self.num_pairs, self.vocab_size // 3
        require(
            self.seq_len >= 6 * pairs,
            f"compositional.seq_len={self.seq_len} does not fit {self.num_first} x "
            f"{self.num_second} = {pairs} pairs: storing takes {3 * pairs} tokens and asking at "
            f"least {3 * pairs}, so seq_len must be at least {6 * pairs}. Raise seq_len or use at "
            f"most {self.seq_len // 6} pairs.",
        )
        smallest = 3 * max(self.num_first + 1, self.num_second, pairs)
        require(
            third > self.num_first
            and third >= self.num_second
            and self.vocab_size - 2 * third >= pairs,
            f"compositional.vocab_size={self.vocab_size} is too small for {self.num_first} first "
            f"keys, {self.num_second} second keys and {pairs} values: each take one third, so "
            f"{smallest} is enough.",
        )

    @property
    def num_pairs(self) -> int:
        """Pairs of keys stored, each with a value."""
        return self.num_first * self.num_second

    @property
    def num_queries(self) -> int:
        return self.num_pairs

    def generate(self, random: RowRandom) -> Batch:
        third, pairs, device = self.vocab_size // 3, self.num_pairs, random.device
        firsts = random.distinct("first_keys", 1, third, self.num_first)
        seconds = random.distinct("second_keys", third, 2 * third, self.num_second)
        values = random.distinct("values", 2 * third, self.vocab_size, pairs)
        cell = torch.argsort(random.bits("order", pairs), dim=1)
        first = firsts.gather(1, cell // self.num_second)
        second = seconds.gather(1, cell % self.num_second)
        num_slots = self.seq_len // 3 - pairs
        slots = random.weighted_order("slots", power_law(num_slots, self.power), pairs)
        query_positions = 3 * (pairs + slots) + 1

        rows = values.shape[0]
        tokens = torch.zeros(rows, self.seq_len, dtype=torch.int64, device=device)
        tokens[:, : 3 * pairs] = torch.stack([first, second, values], dim=2).view(rows, 3 * pairs)
        tokens.scatter_(1, query_positions - 1, first)
        tokens.scatter_(1, query_positions, second)
        is_free = torch.ones_like(tokens, dtype=torch.bool)
        is_free[:, : 3 * pairs] = False
        is_free.scatter_(1, torch.cat([query_positions - 1, query_positions], dim=1), False)
        tokens = fill(
            tokens,
            is_free,
            torch.cat([firsts, seconds], dim=1),
            filler=self.filler,
            vocab_size=self.vocab_size,
            random=random,
        )
        stored_at = 3 * torch.arange(pairs, device=device) + 1
        return Batch(
            tokens=tokens,
            query_positions=query_positions,
            answers=values,
            slices={
                "distance": query_positions - stored_at,
                **constant_slices(
                    values,
                    num_pairs=pairs,
                    seq_len=self.seq_len,
                    num_sharing=self.num_first + self.num_second - 2,
                ),
            },
        )
