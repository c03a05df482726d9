"""What a task is: a frozen configuration that turns row numbers into examples.

Letters   B rows, T tokens, Q queries a row, C token streams a step (1, except `stacked`).
"""

import dataclasses
import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from recallzoo.errors import InvalidConfig
from recallzoo.options import checked
from recallzoo.random import RowRandom, seed_of


@dataclass(frozen=True)
class Batch:
    """Examples of one task.

    The model reads `tokens` and is asked, at each of `query_positions`, for the token in
    `answers`. `slices` names whole numbers that describe each query (distance to the stored
    pair in tokens, number of pairs, ...); accuracy is reported for each of their values.
    """

    tokens: Int[Tensor, "B T *C"]
    query_positions: Int[Tensor, "B Q"]
    answers: Int[Tensor, "B Q"]
    slices: dict[str, Int[Tensor, "B Q"]]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: Tensor) -> "Batch":
        """The examples that an index tensor or boolean mask selects."""
        return Batch(
            tokens=self.tokens[index],
            query_positions=self.query_positions[index],
            answers=self.answers[index],
            slices={name: values[index] for name, values in self.slices.items()},
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same examples on another device."""
        return Batch(
            tokens=self.tokens.to(device),
            query_positions=self.query_positions.to(device),
            answers=self.answers.to(device),
            slices={name: values.to(device) for name, values in self.slices.items()},
        )

    @staticmethod
    def cat(batches: list["Batch"]) -> "Batch":
        """Rows of several batches of equal shape, one after another."""
        return Batch(
            tokens=torch.cat([b.tokens for b in batches]),
            query_positions=torch.cat([b.query_positions for b in batches]),
            answers=torch.cat([b.answers for b in batches]),
            slices={n: torch.cat([b.slices[n] for b in batches]) for n in batches[0].slices},
        )


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A family of examples. Subclasses add their options and implement `generate`.

    `name` is what the command line and stored results call it. `version` goes up whenever
    equal options and seed no longer give equal rows; results of different versions are not
    comparable.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    num_streams: ClassVar[int] = 1
    """Tokens a step reads at once (C); their embeddings are concatenated."""

    vocab_size: int = 8192
    """Number of different tokens, V."""
    seq_len: int = 64
    """Tokens in an example, T."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            value = checked(f"{self.name}.{field.name}", given, hints[field.name])
            object.__setattr__(self, field.name, value)
        require(self.seq_len >= 2, f"{self.name}.seq_len={self.seq_len} must be at least 2.")
        self.validate()

    @abstractmethod
    def validate(self) -> None:
        """Raise InvalidConfig when the sizes do not fit together."""

    @abstractmethod
    def generate(self, random: RowRandom) -> Batch:
        """Make the rows that `random` stands for, on its device."""

    @property
    @abstractmethod
    def num_queries(self) -> int:
        """Queries in an example, Q."""

    def sample(self, rows: Int[Tensor, "B"], seed: int, *, chunk_tokens: int = 2**22) -> Batch:
        """The examples with these row numbers, on the device of `rows`.

        Equal (task, seed, row number) give equal examples on every device. They are made in
        chunks of about `chunk_tokens` tokens, so that memory stays bounded.
        """
        seed = seed_of("task", self.name, self.version, seed)
        chunk_rows = max(1, chunk_tokens // self.seq_len)
        return Batch.cat([self.generate(RowRandom(seed, part)) for part in rows.split(chunk_rows)])


def require(condition: bool, message: str) -> None:
    """Raise InvalidConfig with this message unless the condition holds."""
    if not condition:
        raise InvalidConfig(message)
