"""Stacked recall: key and value in one step, so that a mixer needs no shift to bind them.

    keys      k1 k2  .  . k2 k1  .
    values    v1 v2  .  .  .  .  .
    answers    -  -  -  - v2 v1  -

Each step reads two tokens, whose embeddings are concatenated: tokens[:, t] = (key, value).
A pair takes one step, a query is (key, 0). All pairs come first (`num_passes` times over),
then every key is asked once, at slot r = 1, 2, ... after the pairs, one step each, drawn as in
mqar. Keys are different words of 1..V/2-1, values different words of V/2..V-1.

Source   ours; keys, values and slots as in arXiv:2312.04927, Algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from recallzoo.random import RowRandom
from recallzoo.tasks._contract import Batch, Task, require
from recallzoo.tasks._layout import Filler, constant_slices, fill, power_law, require_positive


@dataclass(frozen=True, kw_only=True)
class Stacked(Task):
    """Multi-query associative recall with key and value in one step."""

    name: ClassVar[str] = "stacked"
    version: ClassVar[int] = 1
    num_streams: ClassVar[int] = 2

    num_pairs: int = 4
    """Key-value pairs stored and asked, P."""
    power: float = 0.01
    """Exponent of the slot law: 1 asks everywhere alike, near 0 mostly soon after the pairs."""
    num_passes: int = 1
    """How often the list of pairs is repeated before the queries (arXiv:2407.05483)."""
    filler: Filler = "zero"
    """What stands between queries, in both streams: zero, random, or random_colliding."""

    def validate(self) -> None:
        require_positive(
            "stacked", num_pairs=self.num_pairs, num_passes=self.num_passes, power=self.power
        )
        needed = self.num_pairs * (self.num_passes + 1)
        require(
            self.seq_len >= needed,
            f"stacked.seq_len={self.seq_len} does not fit num_pairs={self.num_pairs}: storing "
            f"takes {self.num_pairs * self.num_passes} steps and asking at least "
            f"{self.num_pairs}, so seq_len must be at least {needed}. Raise seq_len or use "
            f"num_pairs <= {self.seq_len // (self.num_passes + 1)}.",
        )
        require(
            self.vocab_size >= 2 * self.num_pairs + 2,
            f"stacked.vocab_size={self.vocab_size} is too small for num_pairs={self.num_pairs}: "
            f"keys and values take one half each, so it must be at least "
            f"{2 * self.num_pairs + 2}.",
        )

    @property
    def num_queries(self) -> int:
        return self.num_pairs

    def generate(self, random: RowRandom) -> Batch:
        half, pairs, device = self.vocab_size // 2, self.num_pairs, random.device
        keys = random.distinct("keys", 1, half, pairs)
        values = random.distinct("values", half, self.vocab_size, pairs)
        context_len = pairs * self.num_passes
        slots = random.weighted_order(
            "slots", power_law(self.seq_len - context_len, self.power), pairs
        )
        query_positions = context_len + slots

        first = torch.zeros(keys.shape[0], self.seq_len, dtype=torch.int64, device=device)
        second = torch.zeros_like(first)
        first[:, :context_len] = keys.repeat(1, self.num_passes)
        second[:, :context_len] = values.repeat(1, self.num_passes)
        first.scatter_(1, query_positions, keys)
        is_free = torch.ones_like(first, dtype=torch.bool)
        is_free[:, :context_len] = False
        is_free.scatter_(1, query_positions, False)
        streams = [
            fill(
                stream,
                is_free,
                avoided,
                filler=self.filler,
                vocab_size=self.vocab_size,
                random=random,
                draw=f"filler/{index}",
            )
            for index, (stream, avoided) in enumerate([(first, keys), (second, keys[:, :0])])
        ]
        last_stored = context_len - pairs + torch.arange(pairs, device=device)
        return Batch(
            tokens=torch.stack(streams, dim=2),
            query_positions=query_positions,
            answers=values,
            slices={
                "distance": query_positions - last_stored,
                "slot": slots,
                **constant_slices(query_positions, num_pairs=pairs, seq_len=self.seq_len),
            },
        )
