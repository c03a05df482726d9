"""From a list of runs to a full store: each run once, packs that go on, memory that runs out."""

import dataclasses
import fcntl
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sweeps
import torch
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.devices import choose_device
from recallzoo.errors import InvalidConfig, StoreError, UserError
from recallzoo.executors import local
from recallzoo.executors.devices import expected_cost, free_memory, runs_that_fit
from recallzoo.executors.local import LocalExecutor
from recallzoo.files import read_json, write_json
from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.result import Result
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, make_plan, sweep
from recallzoo.tasks import Data, task
from recallzoo.train.packed import Pack, PackOptions, Progress

CPU = torch.device("cpu")
DATA = Data.of(task("mqar", seq_len=8, num_pairs=1, vocab_size=16), train=32, valid=8, test=8)


def run_of(rate: float = 1e-3, width: int = 16, seed: int = 0, **budget: Any) -> Run:
    return Run(
        data=DATA,
        model=ModelConfig(mixers=(mixer("short_conv"),), d_model=width, num_layers=1),
        optimizer=Optimizer(learning_rate=rate),
        budget=Budget(**{"num_epochs": 3, "batch_size": 32, "stop_accuracy": None, **budget}),
        seed=seed,
    )


RUNS = [run_of(rate, width) for width in (16, 32) for rate in (1e-3, 1e-2, 1e-1)]


class Interrupted(Exception):
    """Stands for Ctrl-C or worse."""


class Watcher:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.started: tuple[int, int, int] | None = None
        self.packs: list[list[str]] = []
        self.finished: list[str] = []
        self.warnings: list[str] = []
        self.num_ended = 0
        self.progress: list[Progress] = []

    def sweep_started(self, num_runs: int, num_finished: int, num_packs: int) -> None:
        self.started = (num_runs, num_finished, num_packs)

    def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None:
        assert 1 <= number <= num_packs
        self.packs.append([run.hash for run in runs])

    def pack_progressed(self, progress: Progress) -> None:
        self.progress.append(progress)

    def run_finished(self, result: Result) -> None:
        self.finished.append(result.hash)

    def pack_ended(self) -> None:
        self.num_ended += 1

    def warned(self, message: str) -> None:
        self.warnings.append(message)


class Leaving(Watcher):
    """Interrupts once the first pack has a checkpoint."""

    def pack_progressed(self, progress: Progress) -> None:
        if progress.epoch == 2:
            raise Interrupted


def do(runs: list[Run], folder: Path, **options: Any) -> tuple[list[Result], Watcher]:
    watcher = Watcher()
    settings = SweepOptions(**{"device": "cpu", **options})
    return sweep(runs, Store(folder), watcher, settings), watcher


class _CalledGpu(LocalExecutor):
    """A CPU under the name of what CI has not."""

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self.device = "cuda:0"


def test_what_is_not_compiled_on_a_gpu_as_it_would_not_pay_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("recallzoo.sweep.LocalExecutor", _CalledGpu)
    long = run_of(num_epochs=10**9)
    _, watcher = do([RUNS[0], RUNS[3], long], tmp_path / "auto", seconds=1e-9)
    (told,) = watcher.warnings
    assert told.startswith("2 of 3 packs are not compiled")
    assert "--compile step" in told
    for choice in (True, False):
        folder = tmp_path / str(choice)
        assert not do(RUNS[:1], folder, compiled=choice, seconds=1e-9)[1].warnings


def test_a_sweep_is_one_call_whose_warnings_are_pythons(tmp_path, monkeypatch):
    (result,) = sweep(RUNS[:1], Store(tmp_path / "quiet"), options=SweepOptions(device="cpu"))
    assert result.status == "finished"
    monkeypatch.setattr("recallzoo.sweep.LocalExecutor", _CalledGpu)
    with pytest.warns(UserWarning, match="1 of 1 packs are not compiled"):
        sweep(RUNS[:1], Store(tmp_path / "told"), options=SweepOptions(device="cpu"))


def hashes(runs: list[Run]) -> list[str]:
    return [run.hash for run in runs]


class _Interrupting(Pack):
    """Trains as a pack does, and breaks off after `results` results of the whole sweep."""

    left = 0

    def train(self) -> Iterator[Result]:
        for result in super().train():
            if _Interrupting.left == 0:
                raise Interrupted
            _Interrupting.left -= 1
            yield result


def interrupt_after(monkeypatch: pytest.MonkeyPatch, results: int) -> None:
    _Interrupting.left = results
    monkeypatch.setattr(local, "Pack", _Interrupting)


NO_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
}


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, most: int, after: int = 0, on: str = "cuda"
) -> None:
    """Packs of more than `most` runs run out of memory, after yielding `after` results."""

    class Short(Pack):
        def __init__(self, runs: list[Run], device: Any, options: PackOptions | None) -> None:
            if len(runs) > most and not after:
                raise NO_MEMORY[on]
            super().__init__(runs, device, options)

        def train(self) -> Iterator[Result]:
            for number, result in enumerate(super().train()):
                if len(self.runs) > most and number == after:
                    raise NO_MEMORY[on]
                yield result

    monkeypatch.setattr(local, "Pack", Short)


def test_a_sweep_trains_every_run_and_returns_the_results_in_order(tmp_path):
    results, watcher = do(RUNS, tmp_path)
    assert [r.hash for r in results] == hashes(RUNS)
    assert watcher.started == (6, 0, 2)
    assert watcher.packs == [hashes(RUNS[:3]), hashes(RUNS[3:])]
    assert sorted(watcher.finished) == sorted(hashes(RUNS))
    assert watcher.num_ended == 2
    assert watcher.warnings == []
    assert watcher.progress
    store = Store(tmp_path)
    assert list(store.results()) == sorted(results, key=lambda r: r.hash)
    assert (tmp_path / "table.parquet").exists()
    assert not list((tmp_path / "packs").iterdir())


def test_finished_runs_are_skipped_and_new_ones_trained(tmp_path):
    first, _ = do(RUNS[:2], tmp_path)
    results, watcher = do(RUNS, tmp_path)
    assert watcher.started == (6, 2, 2)
    assert watcher.packs == [hashes(RUNS[2:3]), hashes(RUNS[3:])]
    assert results[:2] == first
    again, watcher = do(RUNS, tmp_path)
    assert again == results
    assert (watcher.started, watcher.packs) == ((6, 6, 0), [])


@pytest.mark.parametrize("num_results", [0, 1, 3, 4])
def test_an_interrupted_sweep_goes_on_with_the_same_packs(tmp_path, monkeypatch, num_results):
    expected, watcher = do(RUNS, tmp_path / "whole", max_pack_size=2)
    plan = watcher.packs
    interrupt_after(monkeypatch, num_results)
    with pytest.raises(Interrupted):
        do(RUNS, tmp_path / "o", max_pack_size=2)
    monkeypatch.undo()
    kept = Store(tmp_path / "o").hashes()
    assert len(kept) == num_results
    results, watcher = do(RUNS, tmp_path / "o")  # the size that was recorded is kept
    assert watcher.started is not None
    assert watcher.started[:2] == (6, num_results)
    assert sorted(watcher.packs) == sorted(p for p in plan if not set(p) <= set(kept))
    assert not set(kept) & set(watcher.finished)
    for result, wanted in zip(results, expected, strict=True):
        assert (result.hash, result.metrics, result.rows) == (
            wanted.hash,
            wanted.metrics,
            wanted.rows,
        )
    assert not list((tmp_path / "o" / "packs").iterdir())


def test_recorded_packs_that_are_larger_than_asked_are_planned_anew_until_they_begin(
    tmp_path, monkeypatch
):
    interrupt_after(monkeypatch, 0)
    with pytest.raises(Interrupted):
        do(RUNS, tmp_path)  # records two packs of three runs
    monkeypatch.undo()
    with pytest.raises(Interrupted):
        sweep(RUNS, Store(tmp_path), Leaving(), SweepOptions(device="cpu", checkpoint_seconds=0))
    begun, waiting = sorted(
        (tmp_path / "packs").iterdir(),
        key=lambda pack: not (pack / "checkpoint.safetensors").exists(),
    )
    members = read_json(begun / "pack.json")
    others = read_json(waiting / "pack.json")
    plan = make_plan(RUNS, Store(tmp_path), lambda run: 8, 2)
    _, watcher = do(RUNS, tmp_path, max_pack_size=2)
    assert watcher.packs == [members, others[:2], others[2:]]
    assert watcher.packs == [hashes(p) for p in (*(p for _, p in plan.recorded), *plan.new)]
    (warning,) = watcher.warnings
    assert (
        f"more than 2 runs (--max-pack-size) that have begun go on as they are: {begun}" in warning
    )
    assert plan.notes == [warning]


def test_a_run_that_had_left_its_pack_and_was_deleted_is_trained_again(tmp_path):
    class Breaking(Watcher):
        def pack_progressed(self, progress: Progress) -> None:
            if self.finished and progress.epoch > self.progress[-1].epoch + 1:
                raise Interrupted
            if not self.finished:
                super().pack_progressed(progress)

    runs = [sweeps.run_of(rate, 16) for rate in (1e-2, 1e-9)]  # the first leaves early
    settings = SweepOptions(device="cpu", checkpoint_seconds=0.0)
    expected = sweep(runs, Store(tmp_path / "whole"), Watcher(), settings)
    with pytest.raises(Interrupted):
        sweep(runs, Store(tmp_path / "o"), Breaking(), settings)
    assert Store(tmp_path / "o").hashes() == hashes(runs[:1])
    shutil.rmtree(tmp_path / "o" / "runs" / runs[0].hash)
    watcher = Watcher()
    results = sweep(runs, Store(tmp_path / "o"), watcher, settings)
    assert watcher.packs == [hashes(runs), hashes(runs[:1])]
    for result, wanted in zip(results, expected, strict=True):
        assert (result.metrics, result.rows) == (wanted.metrics, wanted.rows)


def test_runs_that_are_known_are_neither_trained_nor_asked_for(tmp_path):
    known = hashes(RUNS[1:3])
    watcher = Watcher()
    results = sweep(RUNS[:4], Store(tmp_path), watcher, SweepOptions(device="cpu"), known)
    assert hashes(RUNS[:1] + RUNS[3:4]) == [result.hash for result in results]
    assert watcher.started == (2, 0, 2)
    assert sorted(Store(tmp_path).planned()) == sorted(result.hash for result in results)
    (call,) = read_json(tmp_path / "sweep.json")["calls"]
    assert (call["num_runs"], call["num_runs_trained"], call["outcome"]) == (2, 2, "finished")


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_recorded_pack_with_runs_that_are_known_by_now_goes_on_only_if_it_has_a_checkpoint(
    tmp_path, has_begun
):
    class AtOnce(Watcher):
        def pack_progressed(self, progress: Progress) -> None:
            raise Interrupted

    settings = SweepOptions(device="cpu", checkpoint_seconds=0)
    with pytest.raises(Interrupted):
        sweep(RUNS[:3], Store(tmp_path), Leaving() if has_begun else AtOnce(), settings)
    watcher = Watcher()
    results = sweep(RUNS[:3], Store(tmp_path), watcher, settings, hashes(RUNS[:1]))
    asked = RUNS[:3] if has_begun else RUNS[1:3]
    assert watcher.packs == [hashes(asked)]
    assert [result.hash for result in results] == hashes(asked)
    assert watcher.started == (len(asked), 0, 1)
    assert [warning[:38] for warning in watcher.warnings] == [
        "1 runs whose results are known go on a"
    ] * has_begun
    assert not list((tmp_path / "packs").iterdir())


def test_a_recorded_pack_of_another_recipe_is_left_for_it(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 0)
    with pytest.raises(Interrupted):
        do(RUNS[:3], tmp_path)
    monkeypatch.undo()
    (record,) = (tmp_path / "packs").glob("*/pack.json")
    _, watcher = do(RUNS[3:], tmp_path)
    assert watcher.packs == [hashes(RUNS[3:])]
    assert read_json(record) == hashes(RUNS[:3])
    _, watcher = do(RUNS, tmp_path)
    assert watcher.packs == [hashes(RUNS[:3])]


def test_pack_folders_that_are_of_no_use_are_removed(tmp_path):
    do(RUNS[:2], tmp_path)
    write_json(tmp_path / "packs" / "done" / "pack.json", hashes(RUNS[:2]))
    (tmp_path / "packs" / "half_removed").mkdir()
    (tmp_path / "packs" / "half_removed" / "checkpoint.safetensors").write_bytes(b"")
    do(RUNS[:2], tmp_path)
    assert not list((tmp_path / "packs").iterdir())


@pytest.mark.parametrize("content", [{"a": 1}, [1], "text"])
def test_a_damaged_record_of_a_pack_is_named(tmp_path, content):
    Store(tmp_path)
    write_json(tmp_path / "packs" / "x" / "pack.json", content)
    with pytest.raises(StoreError, match=r"pack.json is damaged. Delete .*/packs/x and run again"):
        do(RUNS, tmp_path)


def test_an_empty_list_and_identical_runs_are_refused(tmp_path):
    with pytest.raises(InvalidConfig, match="returned no runs"):
        do([], tmp_path)
    twin = dataclasses.replace(RUNS[1], label="another name, the same run")
    with pytest.raises(InvalidConfig) as error:
        do([*RUNS[:3], twin], tmp_path)
    for part in ("runs 1 and 3 (counted from 0) are identical", "seed 0, learning rate 0.01"):
        assert part in str(error.value)
    assert Store(tmp_path).hashes() == []


@pytest.mark.parametrize(("most", "on"), [(1, "cuda"), (2, "cpu"), (4, "cuda")])
def test_a_pack_that_does_not_fit_into_memory_is_cut_until_it_does(tmp_path, monkeypatch, most, on):
    runs = [run_of(seed=seed) for seed in range(5)]
    expected, _ = do(runs, tmp_path / "whole")
    short_of_memory(monkeypatch, most, on=on)
    results, watcher = do(runs, tmp_path / "o", max_pack_size=5)
    trained = [pack for pack in watcher.packs if len(pack) <= most]
    assert sorted(h for pack in trained for h in pack) == sorted(hashes(runs))
    assert len(watcher.warnings) == len(watcher.packs) - len(trained)
    assert watcher.warnings[0] == "out of memory with 5 runs in a pack; going on with 3."
    assert watcher.num_ended == len(watcher.packs)
    for result, wanted in zip(results, expected, strict=True):
        assert result.test_loss_nats == pytest.approx(wanted.test_loss_nats, abs=1e-4)
    assert not list((tmp_path / "o" / "packs").iterdir())


def test_runs_that_finished_before_memory_ran_out_are_not_trained_again(tmp_path, monkeypatch):
    runs = [run_of(seed=seed) for seed in range(4)]
    short_of_memory(monkeypatch, most=3, after=1)
    results, watcher = do(runs, tmp_path, max_pack_size=4)
    assert [len(pack) for pack in watcher.packs] == [4, 2, 1]
    assert [r.provenance["pack_size"] for r in results].count(4) == 1
    assert watcher.finished[0] not in [h for pack in watcher.packs[1:] for h in pack]


def test_a_run_that_does_not_fit_alone_is_named(tmp_path, monkeypatch):
    short_of_memory(monkeypatch, most=0)
    with pytest.raises(UserError) as error:
        do(RUNS[:2], tmp_path)
    for part in (RUNS[0].hash, "short_conv", "even alone", "budget.batch_size"):
        assert part in str(error.value)


def grouped(num_rates: int, num_seeds: int) -> list[Run]:
    return [
        run_of(1e-3 * (1 + rate), seed=seed, stop_accuracy=0.9, stop_group=True)
        for rate in range(num_rates)
        for seed in range(num_seeds)
    ]


@given(num_rates=st.integers(1, 5), num_seeds=st.integers(1, 4), size=st.integers(1, 9))
def test_packs_hold_every_run_once_are_no_larger_than_asked_and_keep_groups(
    num_rates, num_seeds, size
):
    runs = grouped(num_rates, num_seeds) + RUNS
    packs = make_plan(runs, None, lambda run: runs_that_fit(run, CPU), size).new
    assert sorted(run.hash for pack in packs for run in pack) == sorted(hashes(runs))
    assert max(map(len, packs)) <= size
    assert all(len({run.pack_key for run in pack}) == 1 for pack in packs)
    places = {(run.group_key, n) for n, pack in enumerate(packs) for run in pack}
    if num_rates <= size:
        stopping = {key for run in runs if run.budget.stop_group for key in [run.group_key]}
        assert sum(key in stopping for key, _ in places) == num_seeds


def test_a_group_that_is_cut_is_reported(tmp_path):
    _, watcher = do(grouped(3, 2), tmp_path, max_pack_size=2)
    assert watcher.warnings == ["2 groups do not fit into one pack: their parts stop apart."]
    _, watcher = do(grouped(3, 2), tmp_path / "o", max_pack_size=3)
    assert watcher.warnings == []
    assert [len(pack) for pack in watcher.packs] == [3, 3]


def test_fewer_large_runs_than_small_ones_are_expected_to_fit():
    small = run_of()
    large = dataclasses.replace(
        small,
        data=Data.of(task("mqar", seq_len=512, num_pairs=64), train=256, valid=8, test=8),
        budget=dataclasses.replace(small.budget, batch_size=256),
    )
    assert 1 <= runs_that_fit(large, CPU) < runs_that_fit(small, CPU)


def test_what_a_pack_held_is_given_back_before_the_next():
    def num_held() -> int:
        tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
        return sum(t.numel() == 4243 * 16 for t in tensors)  # embeddings, gradients, moments

    data = Data.of(task("mqar", seq_len=8, num_pairs=1, vocab_size=4243), train=32, valid=8, test=8)
    gc.disable()
    try:
        list(Pack([dataclasses.replace(run_of(), data=data)], CPU).train())
        assert num_held() >= 3  # of a program that refers to itself
        free_memory(CPU)
        assert num_held() == 0
    finally:
        gc.enable()


def test_packs_that_share_a_device_have_a_part_of_its_memory_each():
    run = dataclasses.replace(
        run_of(),
        data=Data.of(task("mqar", seq_len=64, num_pairs=4), train=256, valid=8, test=8),
        budget=Budget(batch_size=128),
    )
    whole = runs_that_fit(run, CPU, 2**28)
    assert 2 <= runs_that_fit(run, CPU, 2**27) <= whole / 2 + 1
    assert runs_that_fit(run, CPU, 2**20) == 1


def test_more_runs_steps_width_layers_and_tokens_are_expected_to_cost_more():
    small = run_of()
    costs = [
        expected_cost(pack)
        for pack in (
            [small],
            [small, run_of(1e-2)],
            [run_of(num_epochs=9)] * 2,
            [run_of(width=64, num_epochs=9)] * 2,
        )
    ]
    assert costs == sorted(set(costs))
    assert costs[1] == 2 * costs[0]
    longer = Data.of(
        task("mqar", seq_len=16, num_pairs=1, vocab_size=16), train=32, valid=8, test=8
    )
    deeper = dataclasses.replace(small.model, num_layers=2)
    for change in ({"data": longer}, {"model": deeper}):
        assert expected_cost([dataclasses.replace(small, **change)]) > costs[0]


def calls(folder: Path) -> list[dict[str, Any]]:
    return read_json(folder / "sweep.json")["calls"]


def test_every_call_is_recorded_with_its_time_and_what_it_trained(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        do(RUNS, tmp_path, max_pack_size=3)
    monkeypatch.undo()
    do(RUNS, tmp_path)
    first, second = calls(tmp_path)
    assert (first["outcome"], second["outcome"]) == ("Interrupted", "finished")
    assert [call["num_runs_trained"] for call in (first, second)] == [1, 5]
    assert (second["executor"], second["device"], second["num_devices"]) == ("local", "cpu", 1)
    assert (second["packs_per_device"], second["num_packs"], second["num_runs"]) == (1, 2, 6)
    assert first["started"] < first["ended"] < second["started"] < second["ended"]
    assert 0 < second["wall_seconds"] < 600


@pytest.mark.parametrize("content", [[], {"record_version": 2, "calls": []}, {}])
def test_a_record_of_calls_that_cannot_be_read_is_named(tmp_path, content):
    store = Store(tmp_path)
    write_json(tmp_path / "sweep.json", content)
    with pytest.raises(StoreError, match=r"sweep.json is damaged, or was written by a newer"):
        sweep(RUNS[:1], store, Watcher(), SweepOptions(device="cpu"))


def test_no_advice_deletes_the_runs_beside_a_damaged_record_of_calls(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(StoreError, match=r"sweep.json .*delete it: the results do not") as error:
        sweep(RUNS[:1], store, Watcher(), SweepOptions(device="cpu"))
    assert "folder it is in" not in str(error.value)


@pytest.mark.parametrize("name", ["tpu", "", "gpu:0", "cuda:-1", "cpu cuda"])
def test_an_unknown_device_is_named_with_those_that_are_known(name):
    with pytest.raises(UserError, match=r"is unknown. Use auto, cpu, cuda or cuda:N"):
        choose_device(name)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu:1"])
def test_a_device_of_another_kind_is_refused(name):
    with pytest.raises(UserError, match=r"is not supported. Use auto, cpu, cuda or cuda:N"):
        choose_device(name)


def test_a_missing_gpu_is_named_and_auto_takes_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"'cuda:1' was asked for.*sees 0 CUDA devices"):
        do(RUNS, tmp_path, device="cuda:1")
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UserError, match="sees 1 CUDA devices"):
        choose_device("cuda:1")


def test_a_pack_size_below_one_is_refused():
    with pytest.raises(InvalidConfig, match="max_pack_size=0 must be at least 1"):
        SweepOptions(max_pack_size=0)


def test_only_one_process_writes_to_a_folder_at_a_time(tmp_path):
    store = Store(tmp_path)
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another process is writing to {tmp_path}"):
            do(RUNS[:1], tmp_path)
        assert store.hashes() == []
    results, _ = do(RUNS[:1], tmp_path)
    assert len(results) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    store = Store(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="no permission"):
        sweep(RUNS[:1], store, Watcher(), SweepOptions(device="cpu"))
    tmp_path.chmod(0o700)


def test_a_sweep_clears_what_killed_processes_left_before_and_while_it_ran(tmp_path):
    store, dead = Store(tmp_path), 2**22 + 1  # above Linux's largest process id

    class Losing(Watcher):
        def run_finished(self, result: Result) -> None:
            super().run_finished(result)
            assert not (tmp_path / "runs" / f".tmp-before-{dead}-0123abcd").exists()
            (tmp_path / "runs" / f".tmp-{len(self.finished)}-{dead}-0123abcd").mkdir()

    (tmp_path / "runs" / f".tmp-before-{dead}-0123abcd").mkdir(parents=True)
    sweep(RUNS[:2], store, Losing(), SweepOptions(device="cpu"))
    assert not list(tmp_path.rglob(".tmp-*"))


class Deleting(Watcher):
    """Deletes the folder, or the first finished run, as that is told of."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__()
        self.folder, self.what = folder, what

    def run_finished(self, result: Result) -> None:
        if not self.finished:
            shutil.rmtree(self.folder / self.what.format(hash=result.hash))
        super().run_finished(result)


@pytest.mark.parametrize("what", ["", "runs/{hash}"])
@pytest.mark.parametrize("num_runs", [1, 2])
def test_a_folder_deleted_during_a_sweep_is_told_and_the_same_command_goes_on(
    tmp_path, what, num_runs
):
    runs, out = [RUNS[0], RUNS[3]][:num_runs], tmp_path / "out"
    with pytest.raises(StoreError, match=r"out was deleted or moved.*the same command again"):
        sweep(runs, Store(out), Deleting(out, what), SweepOptions(device="cpu"))
    assert len(Store(out, create=False).hashes()) == num_runs - 1
    results, watcher = do(runs, out)
    assert len(results) == num_runs
    assert len(watcher.finished) == 1


def test_a_folder_deleted_before_its_first_result_is_told_though_all_are_there(tmp_path):
    out = tmp_path / "out"

    class Early(Watcher):
        def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None:
            shutil.rmtree(out)
            super().pack_started(runs, number, num_packs)

    with pytest.raises(StoreError, match=r"out was deleted or moved.*the same command again"):
        sweep([RUNS[0]], Store(out), Early(), SweepOptions(device="cpu"))
    results, watcher = do([RUNS[0]], out)
    assert len(results) == 1
    assert not watcher.finished


def test_a_run_stored_in_a_deleted_folder_can_be_read_again(tmp_path):
    store = Store(tmp_path / "out")
    [result], _ = do([RUNS[0]], tmp_path / "other")
    shutil.rmtree(tmp_path / "out")
    store.write(result)
    assert Store(tmp_path / "out", create=False).read(result.hash).hash == result.hash


def test_emulated_bfloat16_is_warned_of_and_kept_with_the_results_it_made(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    bf16 = dataclasses.replace(RUNS[0], precision="bf16")
    results, watcher = do([bf16, RUNS[1]], tmp_path)
    (warning,) = watcher.warnings
    assert "--precision fp32" in warning
    assert [r.provenance["fallbacks"] for r in results] == [[warning], []]
