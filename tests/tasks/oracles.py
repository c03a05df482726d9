"""What each task asks, restated by reading tokens one by one, and configurations to try it on."""

import itertools
import typing
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
from hypothesis import assume

from recallzoo.errors import InvalidConfig
from recallzoo.tasks import Task, option_types, registry

Row = list[Any]
Oracle = Callable[[Any, Row, int], tuple[int, int]]
"""(task, tokens up to and including the query, query position) -> (answer, distance)."""


def _one_binding(task: Task, prefix: Row, query: int) -> tuple[int, int]:
    earlier = [i for i in range(query) if prefix[i] == prefix[query]]
    followers = {prefix[i + 1] for i in earlier}
    assert len(followers) == 1, f"{prefix[query]} is followed by {followers}"
    return followers.pop(), query - earlier[-1]


def _last_binding(task: Task, prefix: Row, query: int) -> tuple[int, int]:
    last = max(i for i in range(query) if prefix[i] == prefix[query])
    return prefix[last + 1], query - last


def _two_keys(task: Task, prefix: Row, query: int) -> tuple[int, int]:
    asked = prefix[query - 1 : query + 1]
    earlier = [i for i in range(1, query) if prefix[i - 1 : i + 1] == asked]
    assert len(earlier) == 1
    return prefix[earlier[0] + 1], query - earlier[0]


def _sequences(task: Any, prefix: Row, query: int) -> tuple[int, int]:
    end = query
    while prefix[end] >= task.vocab_size // 2:
        end -= 1
    key = prefix[end + 1 - task.key_len : end + 1]
    earlier = [
        i for i in range(task.key_len - 1, end) if prefix[i + 1 - task.key_len : i + 1] == key
    ]
    assert len(earlier) == 1
    stored = prefix[earlier[0] + 1 : earlier[0] + 1 + task.value_len]
    given = query - end
    assert stored[:given] == prefix[end + 1 : query + 1]
    return stored[given], end - earlier[0]


def _two_streams(task: Task, prefix: Row, query: int) -> tuple[int, int]:
    assert prefix[query][1] == 0
    earlier = [i for i in range(query) if prefix[i][0] == prefix[query][0]]
    assert len({prefix[i][1] for i in earlier}) == 1
    return prefix[earlier[-1]][1], query - earlier[-1]


ORACLES: dict[str, Oracle] = {
    "mqar": _one_binding,
    "forgetting": _last_binding,
    "compositional": _two_keys,
    "in_stream": _one_binding,
    "multi_token": _sequences,
    "stacked": _two_streams,
}


def _fitting(
    cls: type[Task], options: dict[str, Any], seq_lens: list[int], vocab_sizes: list[int]
) -> Task | None:
    """The task at the first length and vocabulary that its other options fit in."""
    for vocab_size, seq_len in itertools.product(vocab_sizes, seq_lens):
        try:
            return cls(seq_len=seq_len, vocab_size=vocab_size, **options)
        except InvalidConfig:
            continue
    return None


def _values(wanted: Any, largest: int, legacy: bool) -> list[Any]:
    if typing.get_origin(wanted) is typing.Literal:
        values = list(typing.get_args(wanted))
        return values if legacy else [v for v in values if "colliding" not in str(v)]
    parts = typing.get_args(wanted) or (wanted,)
    values: list[Any] = [None] if type(None) in parts else []
    if int in parts:
        values += range(1, largest + 1)
    if float in parts:
        values += [0.01, 0.5, 1.0, 2.0]
    return values


@st.composite
def tasks(draw: st.DrawFn, name: str, legacy: bool = False) -> Task:
    """Any configuration of a registered task, of small sizes."""
    cls = registry[name]
    options = {
        option: draw(st.sampled_from(_values(wanted, 5, legacy)), label=option)
        for option, (wanted, _) in option_types(cls).items()
        if option not in ("seq_len", "vocab_size")
    }
    seq_lens = [draw(st.integers(2, 60), label="seq_len"), 64, 100, 160, 500]
    vocab_sizes = [draw(st.integers(4, 60), label="vocab_size"), 64, 200]
    task = _fitting(cls, options, seq_lens, vocab_sizes)
    assume(task is not None)
    assert task is not None
    return task


def smallest(name: str) -> Task:
    """The configuration with the fewest different rows."""
    cls = registry[name]
    counts = [o for o, (wanted, _) in option_types(cls).items() if wanted is int]
    counts = [o for o in counts if o not in ("seq_len", "vocab_size")]
    for size in (1, 2, 3):
        sizes = dict.fromkeys(counts, size)
        task = _fitting(cls, sizes, list(range(2, 100)), list(range(4, 100)))
        if task is not None:
            return task
    raise AssertionError(f"no small configuration of {name} is valid")
