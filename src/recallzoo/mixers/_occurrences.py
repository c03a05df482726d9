"""Where in its own past a sequence holds an equal key.

A key is a whole number: a token id, or the code of a hidden state. Sorting the pairs (key,
position) of a row brings equal keys together in the order of their positions, so that an entry's
earlier occurrences are its neighbours to the left: O(T log T), without a loop over positions and
without comparing all pairs. Nothing here looks ahead: what is said of a position follows from
keys up to it.

Letters   B batch, T time, N latest occurrences.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

MAX_KEY_BITS = 32
"""Keys must be in 0..2^32 - 1, so that key and position fit an int64 for any T below 2^31."""


@dataclass(frozen=True)
class Occurrences:
    """The positions of a sequence in order of (key, position)."""

    position: Int[Tensor, "B T"]
    """Position of each sorted entry."""
    place: Int[Tensor, "B T"]
    """How many earlier positions hold an equal key, of each sorted entry."""

    @property
    def entry(self) -> Int[Tensor, "B T"]:
        """The sorted entry of each position: the inverse of `position`."""
        index = torch.arange(self.position.shape[-1], device=self.position.device)
        return torch.zeros_like(self.position).scatter(
            1, self.position, index.expand_as(self.position)
        )


def occurrences(keys: Int[Tensor, "B T"]) -> Occurrences:
    """Sort a sequence's positions by key, then by position."""
    seq_len = keys.shape[-1]
    index = torch.arange(seq_len, device=keys.device)
    ordered = torch.sort(keys.long() * seq_len + index, dim=-1).values
    key = torch.div(ordered, seq_len, rounding_mode="floor")
    is_first = torch.cat(
        [torch.ones_like(key[:, :1], dtype=torch.bool), key[:, 1:] != key[:, :-1]], dim=1
    )
    first = torch.cummax(torch.where(is_first, index, 0), dim=1).values
    return Occurrences(position=ordered - key * seq_len, place=index - first)


def is_repeated(keys: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Whether an earlier position holds an equal key."""
    found = occurrences(keys)
    repeated = torch.zeros_like(keys, dtype=torch.bool)
    return repeated.scatter(1, found.position, found.place > 0)


def latest(
    found: Occurrences, positions: Int[Tensor, "B Q"], num_latest: int
) -> tuple[Int[Tensor, "B Q N"], Bool[Tensor, "B Q N"]]:
    """For each of `positions` the N latest earlier ones with an equal key, latest first, and
    whether there are that many; where not, the position given is 0."""
    entry = torch.gather(found.entry, 1, positions)
    place = torch.gather(found.place, 1, entry)
    back = torch.arange(1, num_latest + 1, device=positions.device)
    exists = back <= place[..., None]
    source = torch.where(exists, entry[..., None] - back, 0)
    at = torch.gather(found.position, 1, source.flatten(1)).view_as(source)
    return torch.where(exists, at, 0), exists
