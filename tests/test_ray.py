"""A sweep on a Ray cluster ends with the table of one in this process, whatever is lost.

The cluster is a real one, of this machine's CPUs.
"""

import dataclasses
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from recallzoo.errors import InvalidConfig, StoreError, UserError
from recallzoo.executors._contract import Watcher
from recallzoo.executors._lanes import Lanes, Seat, share_of_one
from recallzoo.executors._worker import WorkerOptions, compile_threads
from recallzoo.executors.on_ray import longest_first
from recallzoo.files import read_json
from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.result import Result
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, sweep
from recallzoo.tasks import Data, task
from recallzoo.train.packed import Progress

DATA = Data.of(task("mqar", seq_len=8, num_pairs=1, vocab_size=512), train=2048, valid=64, test=64)
NUM_WORKERS = 3
OPTIONS = {"device": "cpu", "checkpoint_seconds": 0.0}
ON_RAY = {**OPTIONS, "executor": "ray", "devices": NUM_WORKERS}

HUNGRY = """
import torch
from torch import nn

class Hungry(nn.Module):
    def __init__(self, d_model, max_seq_len):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2**44))

    def forward(self, x):
        return x
"""


def run_of(rate: float, width: int, num_epochs: int = 8) -> Run:
    return Run(
        data=DATA,
        model=ModelConfig(mixers=(mixer("attention"),), d_model=width, num_layers=1),
        optimizer=Optimizer(learning_rate=rate),
        budget=Budget(num_epochs=num_epochs, batch_size=32, stop_accuracy=0.02),
        seed=1,
    )


RUNS = [run_of(rate, width) for width in (16, 32) for rate in (1e-5, 1e-3, 1e-2)]


class Notes:
    """A watcher that follows several packs, and may act when it hears of progress."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.finished: list[str] = []
        self.started: list[int] = []
        self.num_packs = 0
        self.at_once = self.most_at_once = 0

    def beside(self) -> Watcher:
        return self

    def sweep_started(self, num_runs: int, num_finished: int, num_packs: int) -> None:
        self.num_packs = num_packs

    def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None:
        assert number <= num_packs
        self.started.append(number)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)

    def pack_progressed(self, progress: Progress) -> None:
        assert progress.step <= progress.num_steps

    def run_finished(self, result: Result) -> None:
        self.finished.append(result.hash)

    def pack_ended(self) -> None:
        self.at_once -= 1

    def warned(self, message: str) -> None:
        self.warnings.append(message)


def workers_in_training() -> list[int]:
    """Workers of our own cluster, by the title that Ray gives one while it has a task."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            if title.startswith(b"ray::PackWorker.train") and _is_descendant(int(folder.name)):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def _is_descendant(process: int) -> bool:
    """Whether we started a process, or one that started it: other tests have clusters too."""
    while process > 1:
        if process == os.getpid():
            return True
        stat = Path(f"/proc/{process}/stat").read_text()
        process = int(stat.rsplit(")", 1)[1].split()[1])  # after the name, which may hold anything
    return False


class Killer(Notes):
    """Kills a worker once a pack has left a checkpoint, `times` times."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__()
        self.folder, self.left, self.killed = folder, times, 0

    def pack_progressed(self, progress: Progress) -> None:
        super().pack_progressed(progress)
        workers = workers_in_training()
        if self.left and workers and list(self.folder.glob("packs/*/checkpoint.safetensors")):
            os.kill(workers[0], signal.SIGKILL)
            self.left -= 1
            self.killed += 1


def table(folder: Path) -> pl.DataFrame:
    """Without what depends on the clock, or on commits made while this runs."""
    return pl.read_parquet(folder / "table.parquet").drop("train_seconds", "commit")


def metrics(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.glob("runs/*/metrics.jsonl")}


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 2},
        {"ray_address": "auto"},
        {"packs_per_device": 2},
        {"executor": "slurm"},
        {**ON_RAY, "devices": 0},
        {**ON_RAY, "packs_per_device": 0},
        {**ON_RAY, "packs_per_device": 65},
    ],
)
def test_options_that_would_be_ignored_are_refused(options):
    with pytest.raises(InvalidConfig):
        SweepOptions(**options)


def test_an_address_where_nothing_listens_is_named(tmp_path, monkeypatch):
    module = pytest.importorskip("ray")
    monkeypatch.setattr(module, "is_initialized", lambda: False)  # by other tests here
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = SweepOptions(**{**ON_RAY, "ray_address": f"127.0.0.1:{port}"})
    with pytest.raises(UserError, match=f"no Ray cluster answers at '127.0.0.1:{port}'"):
        sweep(RUNS, Store(tmp_path), Notes(), options)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'recallzoo\[ray\]'"):
        sweep(RUNS, Store(tmp_path / "o"), Notes(), SweepOptions(**ON_RAY))


@pytest.fixture(scope="module")
def ray():
    """One cluster for all tests here; as many CPUs as workers, however few the machine has."""
    module = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    module.init(num_cpus=NUM_WORKERS, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()


@pytest.mark.slow
def test_packs_that_share_a_device_and_a_worker_killed_change_nothing_in_the_table(ray, tmp_path):
    sweep(RUNS, Store(tmp_path / "here"), Notes(), SweepOptions(**OPTIONS))
    watcher = Killer(tmp_path / "ray", times=1)
    options = SweepOptions(**{**ON_RAY, "devices": 1, "packs_per_device": 2})
    results = sweep(RUNS, Store(tmp_path / "ray"), watcher, options)
    assert watcher.killed == 1
    [warning] = [w for w in watcher.warnings if "worker was lost" in w]
    assert "goes on from its last checkpoint" in warning
    assert [result.hash for result in results] == [run.hash for run in RUNS]
    assert_frame_equal(table(tmp_path / "ray"), table(tmp_path / "here"))
    assert metrics(tmp_path / "ray") == metrics(tmp_path / "here")
    assert sorted(watcher.finished) == sorted(run.hash for run in RUNS)
    assert watcher.num_packs == 2
    assert watcher.started == [1, 2, 3]
    assert watcher.most_at_once > 1
    assert watcher.at_once == 0
    [call] = read_json(tmp_path / "ray" / "sweep.json")["calls"]
    assert (call["executor"], call["device"], call["outcome"]) == ("ray", "cpu", "finished")
    assert (call["num_devices"], call["packs_per_device"]) == (1, 2)
    assert (call["num_packs"], call["num_runs"], call["num_runs_trained"]) == (2, 6, 6)
    assert not list((tmp_path / "ray" / "packs").iterdir())


@pytest.mark.slow
def test_a_pack_that_does_not_fit_into_memory_is_halved_and_one_that_never_fits_is_named(
    ray, tmp_path
):
    (tmp_path / "hungry.py").write_text(HUNGRY)
    model = ModelConfig(mixers=(mixer(f"{tmp_path}/hungry.py:Hungry"),), d_model=16, num_layers=1)
    runs = [dataclasses.replace(run, model=model) for run in RUNS[:2]]
    watcher = Notes()
    options = SweepOptions(**ON_RAY, packs_per_device=2)
    with pytest.raises(UserError, match="into 1/2 of the device's memory even alone"):
        sweep(runs, Store(tmp_path / "o"), watcher, options)
    assert watcher.warnings == ["out of memory with 2 runs in a pack; going on with 1."]
    [call] = read_json(tmp_path / "o" / "sweep.json")["calls"]
    assert (call["outcome"], call["num_runs_trained"]) == ("UserError", 0)


@pytest.mark.slow
def test_packs_are_spread_over_devices_before_they_share_one(ray):
    class Where:
        def group(self) -> str | None:
            import ray

            return ray.get_runtime_context().get_placement_group_id()

    def group(seat: Seat | None) -> str:
        assert seat is not None
        return ray.get(seat.worker.group.remote())

    where = ray.remote(Where)
    lanes = Lanes(ray, "CPU", 2, lambda needs: where.options(**needs).remote())
    lanes.ask_for(2)
    seats = [lanes.take(cost) for cost in (5.0, 3.0, 1.0, 2.0)]
    assert lanes.take(1.0) is None
    groups = [group(seat) for seat in seats]
    assert groups == [groups[0], groups[1], groups[1], groups[0]]
    assert groups[0] != groups[1]
    assert seats[0] is not None
    lanes.give_back(seats[0], is_alive=True)
    again = lanes.take(4.0)
    assert again is not None
    assert again.worker is seats[0].worker
    lanes.give_back(again, is_alive=False)
    other = lanes.take(4.0)
    assert group(other) == groups[0]
    lanes.release()
    assert group(other) == groups[0]
    lanes.release(busy=True)


def test_packs_of_a_machine_have_its_cpus_for_compiling():
    def threads(resources: dict[str, float], **options: Any) -> int:
        common = {"folder": "", "compiled": None, "checkpoint_seconds": 0.0, "version": ""}
        defaults: dict[str, Any] = {
            "device": "cuda",
            "packs_per_device": 1,
            "most_devices": None,
        }
        return compile_threads(resources, WorkerOptions(**{**common, **defaults, **options}))

    machine = {"CPU": 32.0, "GPU": 2.0}
    assert threads(machine) == 16
    assert threads(machine, packs_per_device=4) == 4
    assert threads(machine, packs_per_device=4, most_devices=1) == 8
    assert threads(machine, packs_per_device=64) == 1
    assert threads(machine, device="cpu") == 1


def test_the_longest_packs_are_handed_out_first():
    short, middle, long = ("a", [run_of(1e-3, 16)]), ("b", RUNS[:3]), ("c", RUNS[3:])
    assert longest_first([short, long, middle]) == [long, middle, short]


@pytest.mark.parametrize("packs", [1, 2, 3, 6, 7, 64])
def test_shares_of_a_device_are_such_that_all_fit(packs):
    share = share_of_one(packs)
    assert 0.99 < packs * share <= 1
    assert round(share * 10_000) == pytest.approx(share * 10_000, abs=1e-6)


@pytest.mark.slow
def test_a_pack_that_takes_down_every_worker_is_given_up(ray, tmp_path, monkeypatch):
    from recallzoo.executors import on_ray

    runs = [run_of(1e-3, 16, num_epochs=10_000)]
    options = SweepOptions(**{**ON_RAY, "checkpoint_seconds": 1e9})
    watcher = Killer(tmp_path, times=on_ray.MOST_LOSSES)
    (tmp_path / "packs" / "other").mkdir(parents=True)
    (tmp_path / "store.json").write_text('{"store_version": 1}')
    (tmp_path / "packs" / "other" / "pack.json").write_text('["another sweep\'s"]')
    (tmp_path / "packs" / "other" / "checkpoint.safetensors").touch()
    with pytest.raises(StoreError, match=f"{on_ray.MOST_LOSSES} times"):
        sweep(runs, Store(tmp_path), watcher, options)
    assert watcher.killed == on_ray.MOST_LOSSES


@pytest.mark.slow
@pytest.mark.parametrize(("device", "said"), [("cuda", "no GPU"), ("cuda:1", "names one device")])
def test_a_device_that_the_cluster_lacks_is_named(ray, tmp_path, device, said):
    with pytest.raises(UserError, match=said):
        sweep(RUNS, Store(tmp_path), Notes(), SweepOptions(**{**ON_RAY, "device": device}))
