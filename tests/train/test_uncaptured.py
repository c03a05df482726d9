"""What a pack does when its step cannot be captured as a CUDA graph.

Streams and graphs stand for those of a GPU, which CI has not; test_replay.py has it on a real one.
"""

import contextlib
from collections.abc import Callable

import pytest
import torch
from tiny_runs import losses, tiny_run, train

from recallzoo.result import Result
from recallzoo.train import _program
from recallzoo.train._program import Program

BROKEN = RuntimeError("CUDA error: operation failed during capture\nSearch for it in the manual.")
STAGGERED = (tiny_run(learning_rate=1e30), tiny_run())
"""The first diverges and leaves, for which the program is made anew."""


class Stream:
    def wait_stream(self, stream: "Stream") -> None: ...


class Graph:
    def __init__(self, function: Callable[[], None]) -> None:
        self.replay = function


@pytest.fixture(scope="module")
def wanted() -> list[Result]:
    """Without anything that stands for a GPU."""
    return train(*STAGGERED)


@pytest.fixture
def replayed(wanted, monkeypatch):
    """Steps go through `_replay` on the CPU, captured by a function that the test gives."""

    def step(self: Program, segment: int, batch: int) -> None:
        self._cursor.fill_(batch)
        self._replay(("train", segment), lambda: self._train_step(segment))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Program, "train_step", step)
    return lambda capture: monkeypatch.setattr(_program, "capture", capture)


def test_it_trains_the_same_and_tells_the_reason_once(wanted, replayed):
    tried = []

    def capture(function: Callable[[], None]) -> Graph:
        tried.append(function)
        raise BROKEN

    replayed(capture)
    found = train(*STAGGERED)
    assert list(map(losses, found)) == list(map(losses, wanted))
    assert len(tried) == 2, "once for each program, not at every step"
    (fallback,) = found[1].provenance["fallbacks"]
    assert fallback.endswith("one by one: CUDA error: operation failed during capture")


def test_what_is_captured_is_replayed_from_where_the_run_stood(wanted, replayed):
    replayed(Graph)
    found = train(*STAGGERED)
    assert list(map(losses, found)) == list(map(losses, wanted))
    assert found[1].provenance["fallbacks"] == []


def test_lack_of_memory_is_left_to_those_who_halve_packs(replayed):
    def capture(function: Callable[[], None]) -> Graph:
        raise torch.OutOfMemoryError("CUDA out of memory")

    replayed(capture)
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny_run())
