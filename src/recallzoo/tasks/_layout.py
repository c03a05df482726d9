"""Pieces of layout that several tasks share: power-law query slots and filler words."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recallzoo.random import RowRandom
from recallzoo.tasks._contract import require

Filler = Literal["zero", "random", "random_colliding"]
"""What stands where nothing is stored or asked.

zero               token 0, as in the paper's Figure 2.
random             any word but 0 and the keys stored in the same row, so that the answer to
                   every query stays unique.
random_colliding   any word of the whole vocabulary, as HazyResearch/zoology draws them: may
                   repeat a stored key with another follower, which makes up to a few per
                   cent of queries ambiguous. For comparison with published numbers only.
"""


def power_law(num_slots: int, power: float) -> Float[Tensor, "S"]:
    """Log of the weight r ** (power - 1) of slot r = 1..S; power 1 is uniform."""
    return (power - 1.0) * torch.log(torch.arange(1, num_slots + 1, dtype=torch.float64))


def require_positive(task: str, **sizes: float) -> None:
    """Raise InvalidConfig for a count below 1, or a number (a float) not above 0."""
    for name, value in sizes.items():
        if isinstance(value, int):
            require(value >= 1, f"{task}.{name}={value} must be at least 1.")
        else:
            require(value > 0, f"{task}.{name}={value} must be above 0.")


def constant_slices(like: Tensor, **values: int) -> dict[str, Tensor]:
    """Slices that have one value at all queries."""
    return {name: torch.full_like(like, value) for name, value in values.items()}


def fill(
    tokens: Int[Tensor, "B T"],
    is_free: Bool[Tensor, "B T"],
    keys: Int[Tensor, "B N"],
    *,
    filler: Filler,
    vocab_size: int,
    random: RowRandom,
    draw: str = "filler",
) -> Int[Tensor, "B T"]:
    """Put filler words at the free positions; `keys` are the words that random filler avoids.

    They are words of 1..V-1, may repeat within a row, and must leave at least one other word.
    """
    if filler == "zero":
        return tokens.masked_fill(is_free, 0)
    width = tokens.shape[1]
    if filler == "random_colliding":
        words = random.integers(draw, 0, vocab_size, width)
    else:
        words = _other_words(random, draw, keys, vocab_size, width)
    return torch.where(is_free, words, tokens)


def _other_words(
    random: RowRandom, draw: str, keys: Int[Tensor, "B N"], vocab_size: int, width: int
) -> Int[Tensor, "B W"]:
    """Uniform words of 1..V-1 that are none of the row's keys."""
    if keys.shape[1] == 0:
        return random.integers(draw, 1, vocab_size, width)
    ordered = torch.sort(keys, dim=1).values
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    smaller_keys = torch.cumsum(is_new, dim=1) - 1
    # Of the words that are no key, ordered - 1 - smaller_keys lie below each key. A word of
    # rank r among them is preceded by the keys with at most r such words below; repeats of a
    # key are sent past all ranks, so that it counts once.
    below = torch.where(is_new, ordered - 1 - smaller_keys, vocab_size).sort(dim=1).values
    num_others = vocab_size - 1 - is_new.sum(dim=1, keepdim=True)
    rank = random.integers(draw, 0, num_others, width)
    return 1 + rank + torch.searchsorted(below, rank, right=True)
