"""A sweep with a time limit ends cleanly, and goes on from what it left, or from less."""

import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from recallzoo.errors import InvalidConfig, StoreError
from recallzoo.files import read_json, write_json
from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.result import Result
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, sweep
from recallzoo.tasks import Data, task
from recallzoo.train.packed import Pack, PackOptions, Progress

DATA = Data.of(task("mqar", seq_len=8, num_pairs=1, vocab_size=16), train=64, valid=8, test=8)
NUM_EPOCHS = 6


def run_of(rate: float = 1e-3, width: int = 16, num_epochs: int = NUM_EPOCHS) -> Run:
    return Run(
        data=DATA,
        model=ModelConfig(mixers=(mixer("short_conv"),), d_model=width, num_layers=1),
        optimizer=Optimizer(learning_rate=rate),
        budget=Budget(num_epochs=num_epochs, batch_size=32, stop_accuracy=None),
    )


RUNS = [run_of(rate, width) for width in (16, 32) for rate in (1e-3, 1e-2)]


class Clock:
    """Stands for `time.monotonic`: still, but for what is told of, each of which takes a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.epochs: list[int] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def an_epoch(self, progress: Progress) -> None:
        self.now += 10.0
        self.epochs.append(progress.epoch)

    def sweep_started(self, num_runs: int, num_finished: int, num_packs: int) -> None: ...
    def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None: ...
    def run_finished(self, result: Result) -> None: ...
    def pack_ended(self) -> None: ...
    def warned(self, message: str) -> None: ...

    pack_progressed = an_epoch


def table(folder: Path) -> pl.DataFrame:
    return Store(folder).table().drop("train_seconds", "commit")


def do(folder: Path, watcher: Any, runs: list[Run] = RUNS, **options: Any) -> list[Result]:
    return sweep(runs, Store(folder), watcher, SweepOptions(device="cpu", **options))


def undisturbed(folder: Path) -> pl.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        do(folder, Clock(patch))
    return table(folder)


@pytest.mark.parametrize(
    ("seconds", "epochs", "left"),
    [
        (10, 1, 1),  # an epoch takes 10 s, so the second would end too late
        (20, 2, 1),
        (29.9, 2, 1),
        (60, 6, 1),  # the first pack ends just in time, and no other is begun
        (69.9, 7, 1),
        (119.9, 11, 1),
        (121, 12, 0),
    ],
)
def test_a_sweep_stops_where_the_next_epoch_would_end_too_late_and_goes_on_later(
    tmp_path, monkeypatch, seconds, epochs, left
):
    expected = undisturbed(tmp_path / "whole")
    clock = Clock(monkeypatch)
    results = do(tmp_path / "o", clock, seconds=seconds)
    assert len(clock.epochs) == epochs
    assert clock.now <= seconds or epochs == 7, "an epoch of a new pack may take any time"
    assert len(results) == 2 * (epochs // NUM_EPOCHS)
    calls = read_json(tmp_path / "o" / "sweep.json")["calls"]
    assert calls[-1]["outcome"] == ("out of time" if left else "finished")
    assert calls[-1]["num_runs_trained"] == len(results)
    results = do(tmp_path / "o", clock)
    assert [result.hash for result in results] == [run.hash for run in RUNS]
    assert len(clock.epochs) == 2 * NUM_EPOCHS, "no epoch is trained twice"
    assert_frame_equal(table(tmp_path / "o"), expected)
    assert not list((tmp_path / "o" / "packs").iterdir())


def test_what_was_trained_is_kept_though_the_last_epoch_took_longer_than_those_before(
    tmp_path, monkeypatch
):
    clock = Clock(monkeypatch)

    def an_epoch_that_gets_slower(progress: Progress) -> None:
        clock.now += 1.0 if progress.epoch < 3 else 100.0

    def pack(deadline: float | None, on_progress: Any) -> Pack:
        options = PackOptions(
            checkpoint=tmp_path / "checkpoint.safetensors",
            progress_seconds=0,
            deadline=deadline,
            on_progress=on_progress,
        )
        return Pack([run_of()], "cpu", options)

    stopped = pack(20.0, an_epoch_that_gets_slower)
    assert list(stopped.train()) == []
    assert not stopped.is_done
    resumed = pack(None, clock.an_epoch)
    found = list(resumed.train())
    assert resumed.is_done
    assert clock.epochs[-1] == NUM_EPOCHS
    assert 1 not in clock.epochs, "it began anew"
    expected = list(Pack([run_of()], "cpu").train())
    assert [r.metrics for r in found] == [r.metrics for r in expected]


def test_the_first_epoch_of_a_pack_is_broken_off(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    many_steps = Budget(num_epochs=2, batch_size=1, stop_accuracy=None)
    run = dataclasses.replace(run_of(), budget=many_steps)
    options = PackOptions(
        checkpoint=tmp_path / "checkpoint.safetensors",
        progress_seconds=-1,
        deadline=45.0,
        on_progress=clock.an_epoch,
    )
    pack = Pack([run], "cpu", options)
    assert list(pack.train()) == []
    assert not pack.is_done
    assert clock.epochs == [0] * 5, "a report for each of five steps of 64"
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_limit_that_is_over_at_once_begins_nothing(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    clock.sweep_started = lambda *_: clock.an_epoch(  # pyright: ignore[reportAttributeAccessIssue]
        Progress(0, 1, 0, 1, 1, 1, [], None)
    )
    assert do(tmp_path, clock, seconds=5) == []
    assert len(clock.epochs) == 1
    assert not (tmp_path / "table.parquet").exists()
    assert sorted(Store(tmp_path).planned()) == sorted(run.hash for run in RUNS)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_that_is_no_time_is_refused(seconds):
    with pytest.raises(InvalidConfig, match="must be a finite time above 0"):
        SweepOptions(seconds=seconds)


def test_finished_runs_of_several_folders_put_together_are_not_trained_again(tmp_path, monkeypatch):
    """What a short loan of a machine gives back: all but `packs`."""
    expected = undisturbed(tmp_path / "whole")
    clock = Clock(monkeypatch)
    do(tmp_path / "first", clock, RUNS[:2])
    do(tmp_path / "second", clock, RUNS[1:], seconds=85)
    assert len(Store(tmp_path / "second").hashes()) == 1
    for name in ("first", "second"):
        shutil.copytree(
            tmp_path / name,
            tmp_path / "o",
            ignore=shutil.ignore_patterns("packs", ".lock"),
            dirs_exist_ok=True,
        )
    clock.epochs.clear()
    do(tmp_path / "o", clock)
    assert len(clock.epochs) == NUM_EPOCHS, "one pack of the two runs that were left"
    assert_frame_equal(table(tmp_path / "o"), expected)


class Silent:
    """A watcher that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name == "beside":
            raise AttributeError(name)
        return lambda *_: None


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"plan_version": 2, "runs": {}},
        {"plan_version": 1},
        {"plan_version": 1, "runs": {"a": 1}},
    ],
)
def test_a_plan_that_cannot_be_read_is_named(tmp_path, content):
    store = Store(tmp_path)
    write_json(tmp_path / "planned.json", content)
    with pytest.raises(StoreError, match=r"planned.json is damaged, or was written by a newer"):
        store.planned()
    with pytest.raises(StoreError, match=r"planned.json is damaged"):
        do(tmp_path, Silent(), RUNS[:1])


def test_a_plan_grows_with_every_call_and_says_what_each_run_is(tmp_path):
    do(tmp_path, Silent(), RUNS[:1])
    do(tmp_path, Silent(), RUNS[1:3])
    planned = Store(tmp_path).planned()
    assert list(planned) == [run.hash for run in RUNS[:3]]
    assert planned[RUNS[2].hash] == {
        "cell": "short_conv, 1 layers, width 32, fp32; mqar, 8 tokens, 1 pairs",
        "learning_rate": 1e-3,
        "seed": 0,
    }
