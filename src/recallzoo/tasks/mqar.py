"""Multi-query associative recall: store key-value pairs, then give the value of each key asked.

    tokens    k1 v1 k2 v2 |  .   .  k2   .  k1   .
    answers    -  -  -  - |  -   -  v2   -  v1   -

Keys are different words of 1..V/2-1, values different words of V/2..V-1. All pairs come
first (`num_passes` times over), then every key is asked once. A query stands at slot
r = 1, 2, ... after the pairs, two tokens each; slots are drawn without replacement with
weight r ** (power - 1), pair after pair. The answer is not written into the input.

Source   arXiv:2312.04927, Definition 3.1 and Algorithm 1; HazyResearch/zoology at dbcb60d,
         zoology/data/multiquery_ar.py, whose slot law this keeps (the distance that follows
         the power law is from the end of the pairs, not from the key).
Differs  Equal seeds give equal rows whatever else has drawn random numbers; random filler
         cannot repeat a stored key; `num_passes` above one works.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from recallzoo.random import RowRandom
from recallzoo.tasks._contract import Batch, Task, require
from recallzoo.tasks._layout import Filler, constant_slices, fill, power_law, require_positive


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall (arXiv:2312.04927, Definition 3.1)."""

    name: ClassVar[str] = "mqar"
    version: ClassVar[int] = 1

    num_pairs: int = 4
    """Key-value pairs stored and asked, P."""
    power: float = 0.01
    """Exponent of the slot law: 1 asks everywhere alike, near 0 mostly soon after the pairs."""
    num_passes: int = 1
    """How often the list of pairs is repeated before the queries (arXiv:2407.05483)."""
    filler: Filler = "zero"
    """What stands between queries: zero, random, or random_colliding."""

    def validate(self) -> None:
        require_positive(
            "mqar", num_pairs=self.num_pairs, num_passes=self.num_passes, power=self.power
        )
        needed = 2 * self.num_pairs * (self.num_passes + 1)
        most = self.seq_len // (2 * (self.num_passes + 1))
        require(
            self.seq_len % 2 == 0 and self.seq_len >= needed,
            f"mqar.seq_len={self.seq_len} does not fit num_pairs={self.num_pairs}: storing takes "
            f"{2 * self.num_pairs * self.num_passes} tokens and asking at least "
            f"{2 * self.num_pairs}, so seq_len must be even and at least {needed}. Raise seq_len"
            + (f" or use num_pairs <= {most}." if most else " or lower num_passes."),
        )
        require(
            self.vocab_size >= 2 * self.num_pairs + 2,
            f"mqar.vocab_size={self.vocab_size} is too small for num_pairs={self.num_pairs}: keys "
            f"and values take one half each, so it must be at least {2 * self.num_pairs + 2}.",
        )

    @property
    def num_queries(self) -> int:
        return self.num_pairs

    def generate(self, random: RowRandom) -> Batch:
        half, pairs, device = self.vocab_size // 2, self.num_pairs, random.device
        keys = random.distinct("keys", 1, half, pairs)
        values = random.distinct("values", half, self.vocab_size, pairs)
        context_len = 2 * pairs * self.num_passes
        num_slots = (self.seq_len - context_len) // 2
        slots = random.weighted_order("slots", power_law(num_slots, self.power), pairs)
        query_positions = context_len + 2 * slots

        rows = keys.shape[0]
        tokens = torch.zeros(rows, self.seq_len, dtype=torch.int64, device=device)
        stored = torch.stack([keys, values], dim=2).view(rows, 2 * pairs)
        tokens[:, :context_len] = stored.repeat(1, self.num_passes)
        is_free = torch.ones_like(tokens, dtype=torch.bool)
        is_free[:, :context_len] = False
        is_free.scatter_(1, query_positions, False)
        tokens.scatter_(1, query_positions, keys)
        tokens = fill(
            tokens, is_free, keys, filler=self.filler, vocab_size=self.vocab_size, random=random
        )
        last_stored = context_len - 2 * pairs + 2 * torch.arange(pairs, device=device)
        return Batch(
            tokens=tokens,
            query_positions=query_positions,
            answers=values,
            slices={
                "distance": query_positions - last_stored,
                "slot": slots,
                **constant_slices(query_positions, num_pairs=pairs, seq_len=self.seq_len),
            },
        )
