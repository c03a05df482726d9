"""Pair -> count, looked up for many pairs at once, on CPU or GPU.

Linear probing in a table that is built sorted: entry i, in order of home slot, stands at
max(home, slot of entry i - 1, plus one), which is i + cummax(home - i). A lookup starts at the
pair's home slot and goes on until it meets the pair or an empty slot: at the chosen load under
two reads on average, where a binary search in 20 million pairs takes 24.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

_SLOTS_PER_PAIR = 2
_EMPTY = -1
_MIX = (-7046029254386353131, -4658895280553007687)  # odd; SplitMix64's constants as int64


@dataclass(frozen=True)
class HashTable:
    """Slots of (pair, count); an empty slot's pair is -1 and its count 0."""

    num_homes: int
    pairs: Int[Tensor, "slots"]
    counts: Int[Tensor, "slots"]

    @staticmethod
    def build(pairs: Integer[np.ndarray, "P"], counts: Integer[np.ndarray, "P"]) -> "HashTable":
        """From distinct pairs, each two ids of 31 bits packed as `first << 32 | second`."""
        num_homes = max(1, int(len(pairs) * _SLOTS_PER_PAIR))
        signed = torch.from_numpy(np.array(pairs, dtype=np.int64))
        home = _home(signed, num_homes)
        order = torch.argsort(home)
        index = torch.arange(len(home))
        slot = index + torch.cummax(home[order] - index, dim=0).values if len(home) else index
        num_slots = (
            max(num_homes, int(slot[-1]) + 1 if len(slot) else 0) + 1
        )  # ends in an empty one
        table_pairs = torch.full((num_slots,), _EMPTY, dtype=torch.int64)
        table_pairs[slot] = signed[order]
        narrow = torch.int32 if not len(counts) or int(counts.max()) < 2**31 else torch.int64
        table_counts = torch.zeros(num_slots, dtype=narrow)
        table_counts[slot] = torch.from_numpy(counts.astype(np.int64))[order].to(narrow)
        return HashTable(num_homes, table_pairs, table_counts)

    def to(self, device: torch.device) -> "HashTable":
        return HashTable(self.num_homes, self.pairs.to(device), self.counts.to(device))

    def lookup(self, pairs: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """Counts, int64; 0 for a pair that is not in the table."""
        slot = _home(pairs, self.num_homes)
        seen = self.pairs.index_select(0, slot)
        found = self.counts.index_select(0, slot).long() * (seen == pairs)
        # What met another pair goes on to the next slot, until it meets itself or an empty one.
        going = ((seen != pairs) & (seen != _EMPTY)).nonzero().view(-1)
        pairs, slot = pairs.index_select(0, going), slot.index_select(0, going)
        while len(going):
            slot += 1
            seen = self.pairs.index_select(0, slot)
            met = (seen == pairs).nonzero().view(-1)
            counts = self.counts.index_select(0, slot.index_select(0, met)).long()
            found.index_copy_(0, going.index_select(0, met), counts)
            on = ((seen != pairs) & (seen != _EMPTY)).nonzero().view(-1)
            going, pairs, slot = (part.index_select(0, on) for part in (going, pairs, slot))
        return found


def _home(pairs: Tensor, num_homes: int) -> Tensor:
    mixed = (pairs ^ (pairs >> 32)) * _MIX[0]
    mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * _MIX[1]
    return (((mixed >> 32) & 0xFFFFFFFF) * num_homes) >> 32
