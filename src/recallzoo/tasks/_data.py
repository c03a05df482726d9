"""Training, validation and test examples out of segments of tasks, with no row in two splits.

A row here is an example's whole token sequence. Rows of a split are independent draws, so one
may occur twice in the same split, as often as chance has it: taking repeats out would change
the distribution and bound the number of examples by the size of the task's space. Between
splits there is no overlap: a validation row that occurs in training, and a test row that
occurs in either, is redrawn with further row numbers, across segments of all kinds, until
none is left. Rows are compared by a 64-bit hash, which can reject a row that is new (with
probability under 1e-13 a row) but cannot let a known one pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from recallzoo.errors import InvalidConfig
from recallzoo.options import checked
from recallzoo.random import mix64, seed_of
from recallzoo.tasks._contract import Batch, Task, require
from recallzoo.tasks._own import require_batch, source_sha256

Split = Literal["train", "valid", "test"]

_DRAWS_PER_ROW = 100
"""Further rows drawn for each example of a split before its task's space counts as used up."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Examples of one task, a part of a split."""

    task: Task
    num_examples: int

    def __post_init__(self) -> None:
        for field in fields(self):
            checked(f"segment.{field.name}", getattr(self, field.name), field.type)
        require(
            self.num_examples >= 1,
            f"segment.num_examples={self.num_examples} must be at least 1; leave a segment with "
            f"no examples out.",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on, chooses by and reports: mixtures of segments, and their seed.

    Segments may differ in length, in pairs and in task, and differ between splits, as when
    trained on few pairs and tested on many. All must read the same number of token streams.
    """

    train: tuple[Segment, ...]
    """Trained on."""
    valid: tuple[Segment, ...]
    """Decides when to stop and which learning rate is best."""
    test: tuple[Segment, ...]
    """Reported."""
    seed: int = 0
    """Equal seeds give equal rows on every device."""

    def __post_init__(self) -> None:
        checked("data.seed", self.seed, int)
        for split in get_args(Split):
            segments: Any = getattr(self, split)
            if not (
                isinstance(segments, list | tuple)
                and segments
                and all(isinstance(segment, Segment) for segment in segments)
            ):
                raise InvalidConfig(
                    f"data.{split} wants at least one Segment(task=..., num_examples=...) in a "
                    f"tuple, got {segments!r}. Data.of(task) makes all three splits of one task."
                )
            object.__setattr__(self, split, tuple(segments))
        streams = {s.task.num_streams: s.task.name for s in self.segments}
        require(
            len(streams) == 1,
            "data mixes tasks that read different numbers of tokens a step: "
            + ", ".join(f"{name} reads {count}" for count, name in sorted(streams.items()))
            + ". A model reads one number of them; keep such tasks in separate runs.",
        )

    @classmethod
    def of(
        cls,
        task: Task,
        train: int = 100_000,
        valid: int = 3_000,
        test: int = 3_000,
        seed: int = 0,
    ) -> "Data":
        """All three splits from one task, with these numbers of examples."""
        return cls(
            train=(Segment(task=task, num_examples=train),),
            valid=(Segment(task=task, num_examples=valid),),
            test=(Segment(task=task, num_examples=test),),
            seed=seed,
        )

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of all splits."""
        return self.train + self.valid + self.test

    @property
    def vocab_size(self) -> int:
        """Tokens that a model must know: the largest vocabulary of all segments."""
        return max(segment.task.vocab_size for segment in self.segments)

    @property
    def max_seq_len(self) -> int:
        """Length of the longest examples, in tokens."""
        return max(segment.task.seq_len for segment in self.segments)

    @property
    def num_streams(self) -> int:
        """Tokens that a step reads at once, equal in all segments."""
        return self.train[0].task.num_streams


def make_split(
    data: Data,
    split: Split,
    device: torch.device | str = "cpu",
    exclude: Sequence[Batch] | None = None,
) -> list[Batch]:
    """The examples of one split, a Batch per segment, none of them in an earlier split.

    `exclude` are the batches of all earlier splits (train; and valid, for test), where the
    caller has them; otherwise they are made here once more. Raises InvalidConfig if the task
    has too few different rows to keep the splits apart.
    """
    checked("split", split, Split)
    if exclude is None:
        names = get_args(Split)
        exclude = [
            batch
            for batches in _make_in_order(data, names[: names.index(split)], device).values()
            for batch in batches
        ]
    return _make(data, split, device, exclude)


def make_splits(data: Data, device: torch.device | str = "cpu") -> dict[Split, list[Batch]]:
    """All three splits, equal to three calls of `make_split` but made once."""
    return _make_in_order(data, get_args(Split), device)


def row_hashes(tokens: Int[Tensor, "B T *C"], chunk_tokens: int = 2**22) -> Int[Tensor, "B"]:
    """A 64-bit hash of each row's tokens and length; equal rows have equal hashes."""
    flat = tokens.flatten(1)
    width = flat.shape[1]
    column = torch.arange(1, width + 1, dtype=torch.int64, device=tokens.device)
    salt = mix64(mix64(column) + width)
    parts = flat.split(max(1, chunk_tokens // width))
    return torch.cat([mix64(mix64(part + salt).sum(dim=1)) for part in parts])


def _make_in_order(
    data: Data, splits: Iterable[Split], device: torch.device | str
) -> dict[Split, list[Batch]]:
    made: dict[Split, list[Batch]] = {}
    for split in splits:
        made[split] = _make(data, split, device, [b for batches in made.values() for b in batches])
    return made


def _make(
    data: Data, split: Split, device: torch.device | str, exclude: Sequence[Batch]
) -> list[Batch]:
    known = torch.cat(
        [torch.empty(0, dtype=torch.int64, device=device)]
        + [row_hashes(batch.tokens.to(device)) for batch in exclude]
    ).unique()
    segments: tuple[Segment, ...] = getattr(data, split)
    return [
        _make_segment(segment, split, seed_of("data", data.seed, split, index), known)
        for index, segment in enumerate(segments)
    ]


def _make_segment(segment: Segment, split: Split, seed: int, known: Int[Tensor, "N"]) -> Batch:
    """Rows 0..n-1, those that are known replaced, in order, by later rows that are not."""
    task, n = segment.task, segment.num_examples
    rows = torch.arange(n, device=known.device)
    batch = _sample(task, rows, seed)
    if len(known) == 0:
        return batch
    taken = torch.isin(row_hashes(batch.tokens), known).nonzero().squeeze(1)
    if len(taken) == 0:
        return batch
    fresh: list[Tensor] = []
    found, drawn, limit = 0, 0, _DRAWS_PER_ROW * n
    while found < len(taken):
        if drawn >= limit:
            raise InvalidConfig(
                f"{task.name} has too few different rows for disjoint splits: of {n + drawn} rows "
                f"drawn for {n} {split} examples only {n - len(taken) + found} do not occur in an "
                f"earlier split ({len(known)} different rows). Raise vocab_size or seq_len "
                f"(now {task.vocab_size} and {task.seq_len}), or ask for fewer examples."
            )
        count = min(max(1024, 2 * (len(taken) - found)), limit - drawn)
        candidates = torch.arange(n + drawn, n + drawn + count, device=known.device)
        hashes = row_hashes(task.sample(candidates, seed).tokens)
        fresh.append(candidates[~torch.isin(hashes, known)])
        found += len(fresh[-1])
        drawn += count
    rows[taken] = torch.cat(fresh)[: len(taken)]
    return _sample(task, rows, seed)


def _sample(task: Task, rows: Int[Tensor, "B"], seed: int) -> Batch:
    """Examples; a user's own task is held to what it says of them."""
    batch = task.sample(rows, seed)
    if source_sha256(type(task)) is not None:
        require_batch(task, batch, len(rows))
    return batch
