"""Multi-token recall: keys and values of several tokens each.

    tokens    a1 a2 v1 v2 a1 a3 v3 v4 |  .  .  .  . a1 a3 v3  . a1 a2 v1  .
    answers    -  -  -  -  -  -  -  - |  -  -  -  -  - v3 v4  -  - v1 v2  -

Keys are different sequences of `key_len` words of 1..V/2-1, which may share words but not all
of them; values likewise, of `value_len` words of V/2..V-1. With few `key_words` many keys
share words, so that one word of the key does not tell what follows. A query repeats the key;
the value is asked token by token from the key's last token on, each token after the first
with those before it in the input (teacher forcing). A query stands at slot r = 1, 2, ... after
the pairs, key_len + value_len tokens each, drawn as in mqar, which this is with both lengths 1.

Slices   `distance` from the stored key's last token to the query key's last token, the same
         for all tokens of a value; `value_token` 0, 1, ... within the value; `shared_prefix`,
         the number of first tokens that the key has in common with another stored key.
Source   ours, after the layout of arXiv:2312.04927, Algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from recallzoo.random import RowRandom
from recallzoo.tasks._contract import Batch, Task, require
from recallzoo.tasks._layout import Filler, constant_slices, fill, power_law, require_positive


@dataclass(frozen=True, kw_only=True)
class MultiToken(Task):
    """Multi-query associative recall with keys and values of several tokens."""

    name: ClassVar[str] = "multi_token"
    version: ClassVar[int] = 1

    num_pairs: int = 4
    """Key-value pairs stored and asked, P."""
    key_len: int = 2
    """Tokens in a key."""
    value_len: int = 2
    """Tokens in a value."""
    key_words: int | None = None
    """Different words that keys are made of; all of the lower half of the vocabulary if None."""
    power: float = 0.01
    """Exponent of the slot law: 1 asks everywhere alike, near 0 mostly soon after the pairs."""
    filler: Filler = "zero"
    """What stands between queries: zero, random, or random_colliding."""

    def validate(self) -> None:
        require_positive(
            "multi_token",
            num_pairs=self.num_pairs,
            key_len=self.key_len,
            value_len=self.value_len,
            key_words=1 if self.key_words is None else self.key_words,
            power=self.power,
        )
        pairs, slot_len = self.num_pairs, self.key_len + self.value_len
        require(
            self.seq_len >= 2 * pairs * slot_len,
            f"multi_token.seq_len={self.seq_len} does not fit num_pairs={pairs} of "
            f"{self.key_len} + {self.value_len} tokens: storing takes {pairs * slot_len} tokens "
            f"and asking at least as many, so seq_len must be at least {2 * pairs * slot_len}. "
            f"Raise seq_len or use num_pairs <= {self.seq_len // (2 * slot_len)}.",
        )
        half = self.vocab_size // 2
        require(
            self.vocab_size >= 4,
            f"multi_token.vocab_size={self.vocab_size} must be at least 4: keys and values take "
            f"one half each, and word 0 is the filler.",
        )
        require(
            self._key_words < half,
            f"multi_token.key_words={self.key_words} must be at most {half - 1}: words "
            f"1..{half - 1} of vocab_size={self.vocab_size} are for keys.",
        )
        for what, words, length in (
            ("key", self._key_words, self.key_len),
            ("value", self.vocab_size - half, self.value_len),
        ):
            require(
                words**length >= pairs,
                f"multi_token.num_pairs={pairs} needs as many different {what}s, but {words} "
                f"words (vocab_size={self.vocab_size}, key_words={self.key_words}) make only "
                f"{words**length} {what}s of {what}_len={length}. Raise one of these.",
            )

    @property
    def _key_words(self) -> int:
        return self.vocab_size // 2 - 1 if self.key_words is None else self.key_words

    @property
    def num_queries(self) -> int:
        return self.num_pairs * self.value_len

    def generate(self, random: RowRandom) -> Batch:
        half, pairs, device = self.vocab_size // 2, self.num_pairs, random.device
        key_len, value_len, slot_len = self.key_len, self.value_len, self.key_len + self.value_len
        keys = _distinct_sequences(random, "keys", 1, self._key_words, pairs, key_len)
        values = _distinct_sequences(
            random, "values", half, self.vocab_size - half, pairs, value_len
        )
        num_slots = self.seq_len // slot_len - pairs
        slots = random.weighted_order("slots", power_law(num_slots, self.power), pairs)
        starts = slot_len * (pairs + slots)

        rows, context_len = keys.shape[0], slot_len * pairs
        both = torch.cat([keys, values], dim=2)
        tokens = torch.zeros(rows, self.seq_len, dtype=torch.int64, device=device)
        tokens[:, :context_len] = both.view(rows, context_len)
        # The last value token is asked for, but not written.
        asked = starts[:, :, None] + torch.arange(slot_len - 1, device=device)
        asked = asked.flatten(1)
        tokens.scatter_(1, asked, both[:, :, :-1].flatten(1))
        is_free = torch.ones_like(tokens, dtype=torch.bool)
        is_free[:, :context_len] = False
        is_free.scatter_(1, asked, False)
        tokens = fill(
            tokens,
            is_free,
            keys.view(rows, pairs * key_len),
            filler=self.filler,
            vocab_size=self.vocab_size,
            random=random,
        )

        token = torch.arange(value_len, device=device)
        distance = starts - slot_len * torch.arange(pairs, device=device)

        def per_token(of_pair: Tensor) -> Tensor:
            return of_pair[:, :, None].expand(rows, pairs, value_len).flatten(1)

        query_positions = (starts[:, :, None] + key_len - 1 + token).flatten(1)
        return Batch(
            tokens=tokens,
            query_positions=query_positions,
            answers=values.flatten(1),
            slices={
                "distance": per_token(distance),
                "value_token": token.expand(rows, pairs, value_len).flatten(1),
                "shared_prefix": per_token(_shared_prefix(keys)),
                **constant_slices(query_positions, num_pairs=pairs, seq_len=self.seq_len),
            },
        )


def _distinct_sequences(
    random: RowRandom, draw: str, low: int, num_words: int, n: int, length: int
) -> Int[Tensor, "B n L"]:
    """n different sequences of `length` words of low..low+num_words-1.

    Those that fit into 62 bits are drawn as digits of one number, without replacement. Of
    longer ones the first digits are, so that sequences that share all of these never occur
    together; they would with a probability below n**2 * num_words / 2**62.
    """
    leading = 1
    while leading < length and num_words ** (leading + 1) <= 2**62:
        leading += 1
    code = random.distinct(draw, 0, num_words**leading, n)
    digits = [(code // num_words**place) % num_words for place in reversed(range(leading))]
    rest = random.integers(f"{draw}/rest", 0, num_words, n, length - leading)
    return low + torch.cat([torch.stack(digits, dim=2), rest], dim=2)


def _shared_prefix(keys: Int[Tensor, "B P L"]) -> Int[Tensor, "B P"]:
    """Length of the longest prefix that each key shares with another one of its row."""
    group = torch.zeros_like(keys[:, :, 0])
    longest = torch.zeros_like(group)
    for word in keys.unbind(dim=2)[:-1]:
        # Keys with equal prefixes have equal numbers; they are renumbered to stay small.
        number = group * 2**32 + word
        ordered, where = torch.sort(number, dim=1)
        is_new = torch.ones_like(ordered, dtype=torch.bool)
        is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        group = torch.zeros_like(group).scatter(1, where, torch.cumsum(is_new, dim=1))
        longest += _is_repeated(is_new).gather(1, torch.argsort(where, dim=1))
    return longest


def _is_repeated(is_new: Bool[Tensor, "B P"]) -> Int[Tensor, "B P"]:
    """1 where a sorted value equals its left or right neighbour."""
    next_is_new = torch.ones_like(is_new)
    next_is_new[:, :-1] = is_new[:, 1:]
    return (~(is_new & next_is_new)).long()
