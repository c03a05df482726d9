"""Tasks as a user writes them: one that is right, and one for each mistake."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from recallzoo.random import RowRandom
from recallzoo.tasks import Batch, Task
from recallzoo.tasks.mqar import MQAR


@dataclass(frozen=True, kw_only=True)
class First(Task):
    """The first token, asked for at the last."""

    name: ClassVar[str] = "first"
    version: ClassVar[int] = 1

    def validate(self) -> None: ...

    @property
    def num_queries(self) -> int:
        return 1

    def generate(self, random: RowRandom) -> Batch:
        tokens = random.integers("tokens", 1, self.vocab_size, self.seq_len)
        positions = torch.full_like(tokens[:, :1], self.seq_len - 1)
        return Batch(tokens, positions, tokens[:, :1], {"first": tokens[:, :1]})


class TwoAnnounced(First):
    @property
    def num_queries(self) -> int:
        return 2


class Short(First):
    def generate(self, random: RowRandom) -> Batch:
        batch = super().generate(random)
        return replace(batch, tokens=batch.tokens[:, 1:])


class OutsideVocabulary(First):
    def generate(self, random: RowRandom) -> Batch:
        batch = super().generate(random)
        return replace(batch, tokens=batch.tokens + self.vocab_size)


class BehindTheEnd(First):
    def generate(self, random: RowRandom) -> Batch:
        batch = super().generate(random)
        return replace(batch, query_positions=batch.query_positions + 1)


class NoAnswer(First):
    def generate(self, random: RowRandom) -> Batch:
        batch = super().generate(random)
        return replace(batch, answers=batch.answers - self.vocab_size)


class Fractions(First):
    def generate(self, random: RowRandom) -> Batch:
        batch = super().generate(random)
        return replace(batch, slices={"first": batch.answers / 2})


class ByChance(First):
    def generate(self, random: RowRandom) -> Batch:
        batch = super().generate(random)
        return replace(batch, answers=torch.randint(1, self.vocab_size, batch.answers.shape))


class Nothing(First):
    def generate(self, random: RowRandom) -> Batch:
        return None  # pyright: ignore[reportReturnType]


class Breaking(First):
    def generate(self, random: RowRandom) -> Batch:
        raise KeyError("lexicon")


class StillMqar(MQAR):
    def generate(self, random: RowRandom) -> Batch:
        return super().generate(random)
