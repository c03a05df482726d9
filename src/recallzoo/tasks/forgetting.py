"""Forgetting: some keys are bound again to another value, and the last value counts.

    tokens    k1 v1 k2 v2 k1 v3 |  .   .  k2   .  k1   .
    answers    -  -  -  -  -  - |  -   -  v2   -  v3   -

As in mqar, but `num_updates` of the keys are stored a second time. All values, old and new,
are different words, so a stale answer can be told from a wrong one. Updates come after all
pairs (`update_order="after_pairs"`) or anywhere after the pair that they replace
("interleaved": all orders of the pairs and updates are equally likely in which each update
follows its pair).

Source   HazyResearch/zoology at dbcb60d, zoology/data/forgetting_mqar.py.
Differs  There the new value is kept from being equal to the old value of another key than the
         updated one, so an update may change nothing, and new values may repeat; here all
         differ. Interleaved updates are ours.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from recallzoo.random import RowRandom
from recallzoo.tasks._contract import Batch, Task, require
from recallzoo.tasks._layout import Filler, constant_slices, fill, power_law, require_positive


@dataclass(frozen=True, kw_only=True)
class Forgetting(Task):
    """Recall of the last of several values (HazyResearch/zoology, forgetting_mqar)."""

    name: ClassVar[str] = "forgetting"
    version: ClassVar[int] = 1

    num_pairs: int = 4
    """Keys stored and asked, P."""
    num_updates: int = 2
    """Keys among them that are bound a second time, U; 0 makes this mqar."""
    update_order: Literal["after_pairs", "interleaved"] = "after_pairs"
    """Where updates stand: after all pairs, or anywhere after the pair they replace."""
    power: float = 0.01
    """Exponent of the slot law: 1 asks everywhere alike, near 0 mostly soon after the pairs."""
    filler: Filler = "zero"
    """What stands between queries: zero, random, or random_colliding."""

    def validate(self) -> None:
        require_positive("forgetting", num_pairs=self.num_pairs, power=self.power)
        require(
            0 <= self.num_updates <= self.num_pairs,
            f"forgetting.num_updates={self.num_updates} must be 0 to num_pairs={self.num_pairs}: "
            f"a key is updated at most once.",
        )
        stored = self.num_pairs + self.num_updates
        needed = 2 * (stored + self.num_pairs)
        require(
            self.seq_len % 2 == 0 and self.seq_len >= needed,
            f"forgetting.seq_len={self.seq_len} does not fit num_pairs={self.num_pairs} and "
            f"num_updates={self.num_updates}: storing takes {2 * stored} tokens and asking at "
            f"least {2 * self.num_pairs}, so seq_len must be even and at least {needed}. Raise "
            f"seq_len or store less.",
        )
        require(
            self.vocab_size >= 2 * stored and self.vocab_size // 2 > self.num_pairs,
            f"forgetting.vocab_size={self.vocab_size} is too small for {self.num_pairs} keys and "
            f"{stored} values, all different: keys and values take one half each, so it must be "
            f"at least {max(2 * stored, 2 * self.num_pairs + 2)}.",
        )

    @property
    def num_queries(self) -> int:
        return self.num_pairs

    def generate(self, random: RowRandom) -> Batch:
        half, pairs, updates = self.vocab_size // 2, self.num_pairs, self.num_updates
        stored = pairs + updates
        keys = random.distinct("keys", 1, half, pairs)
        old, new = random.distinct("values", half, self.vocab_size, stored).split(
            [pairs, updates], dim=1
        )
        updated = random.distinct("updated", 0, pairs, updates)
        place_of_old, place_of_new = self._places(random, updated)
        slots = random.weighted_order(
            "slots", power_law(self.seq_len // 2 - stored, self.power), pairs
        )
        query_positions = 2 * (stored + slots)

        rows = keys.shape[0]
        tokens = torch.zeros(rows, self.seq_len, dtype=torch.int64, device=random.device)
        tokens.scatter_(1, 2 * place_of_old, keys)
        tokens.scatter_(1, 2 * place_of_old + 1, old)
        tokens.scatter_(1, 2 * place_of_new, keys.gather(1, updated))
        tokens.scatter_(1, 2 * place_of_new + 1, new)
        is_free = torch.ones_like(tokens, dtype=torch.bool)
        is_free[:, : 2 * stored] = False
        is_free.scatter_(1, query_positions, False)
        tokens.scatter_(1, query_positions, keys)
        tokens = fill(
            tokens, is_free, keys, filler=self.filler, vocab_size=self.vocab_size, random=random
        )
        last_place = place_of_old.scatter(1, updated, place_of_new)
        return Batch(
            tokens=tokens,
            query_positions=query_positions,
            answers=old.scatter(1, updated, new),
            slices={
                "distance": query_positions - 2 * last_place,
                "updated": torch.zeros_like(keys).scatter(1, updated, 1),
                **constant_slices(keys, num_pairs=pairs, seq_len=self.seq_len, num_updates=updates),
            },
        )

    def _places(
        self, random: RowRandom, updated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the pairs [B, P] and the updates [B, U] stand among all that is stored."""
        pairs, stored = self.num_pairs, self.num_pairs + self.num_updates
        if self.update_order == "after_pairs":
            place = torch.arange(stored, device=random.device).expand(updated.shape[0], stored)
            return place[:, :pairs], place[:, pairs:]
        place = torch.argsort(random.bits("order", stored), dim=1)
        of_old, of_new = place[:, :pairs], place[:, pairs:]
        replaced = of_old.gather(1, updated)
        of_old = of_old.scatter(1, updated, torch.minimum(replaced, of_new))
        return of_old, torch.maximum(replaced, of_new)
