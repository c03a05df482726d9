"""Accuracy by slice: every query counted once in each of its slices."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.evaluate.accuracy import slice_rows
from recallzoo.result import SliceRow
from recallzoo.tasks import Batch


def batch(slices: dict[str, list[list[int]]]) -> Batch:
    shape = torch.tensor(next(iter(slices.values()))).shape
    nothing = torch.zeros(shape, dtype=torch.int64)
    return Batch(
        tokens=nothing,
        query_positions=nothing,
        answers=nothing,
        slices={name: torch.tensor(values) for name, values in slices.items()},
    )


def test_right_answers_are_counted_for_every_value_of_every_slice():
    rows = slice_rows(
        [batch({"distance": [[2, 4], [2, 8]], "slot": [[0, 1], [0, 1]]})],
        [torch.tensor([[True, False], [False, True]])],
    )
    assert rows == [
        SliceRow(slice="distance", value=2, correct=1, total=2),
        SliceRow(slice="distance", value=4, correct=0, total=1),
        SliceRow(slice="distance", value=8, correct=1, total=1),
        SliceRow(slice="slot", value=0, correct=1, total=2),
        SliceRow(slice="slot", value=1, correct=1, total=2),
    ]


def test_a_slice_that_some_batches_lack_is_counted_over_the_others():
    rows = slice_rows(
        [batch({"pairs": [[1]], "updated": [[0]]}), batch({"pairs": [[1, 1], [3, 1]]})],
        [torch.tensor([[True]]), torch.tensor([[True, False], [True, True]])],
    )
    assert rows == [
        SliceRow(slice="pairs", value=1, correct=3, total=4),
        SliceRow(slice="pairs", value=3, correct=1, total=1),
        SliceRow(slice="updated", value=0, correct=1, total=1),
    ]


def test_nothing_to_count_gives_no_rows():
    assert slice_rows([], []) == []


sizes = st.tuples(st.integers(1, 6), st.integers(1, 4))


@given(st.lists(sizes, min_size=1, max_size=3), st.integers(0, 2**32))
def test_the_values_of_a_slice_add_up_to_all_queries(shapes, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(-high, high, shape, generator=generator)

    batches, correct = [], []
    for shape in shapes:
        drawn = {name: draw(high, shape).tolist() for name, high in (("a", 1), ("b", 5))}
        batches.append(batch(drawn))
        correct.append(draw(2, shape) > 0)
    rows = slice_rows(batches, correct)
    for name in ("a", "b"):
        own = [row for row in rows if row.slice == name]
        assert sum(row.total for row in own) == sum(c.numel() for c in correct)
        assert sum(row.correct for row in own) == sum(int(c.sum()) for c in correct)
        assert [row.value for row in own] == sorted({row.value for row in own})
        for row in own:
            where = [b.slices[name] == row.value for b in batches]
            assert row.total == sum(int(w.sum()) for w in where)
            assert row.correct == sum(
                int((w & c).sum()) for w, c in zip(where, correct, strict=True)
            )
