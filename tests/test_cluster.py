"""A sweep on a Ray cluster ends with the table of one in this process, whatever is lost.

The cluster is a real one, of this machine's CPUs, and the same for all tests here: it takes seconds
to start, as do its workers.
"""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from sweeps import NUM_WORKERS, ON_RAY, OPTIONS, RUNS, TASK, Notes, run_of

from recallzoo.cluster import connected
from recallzoo.errors import StoreError, UserError
from recallzoo.executors import on_ray
from recallzoo.executors._lanes import Lanes, Seat
from recallzoo.files import read_json
from recallzoo.mixers import mixer
from recallzoo.mixers._user_file import import_file
from recallzoo.model import ModelConfig
from recallzoo.result import Result
from recallzoo.run import Budget
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, sweep
from recallzoo.tasks import Data
from recallzoo.text.counting import count_pairs
from recallzoo.train.packed import Progress
from tests.text.shards import write_data, zipf_documents

pytestmark = pytest.mark.slow
SECONDS_LEFT = 5.0
REPOSITORY = Path(__file__).resolve().parents[1]

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


SERVICE_GONE = """
from pathlib import Path
from torch import nn

class Once(nn.Module):
    def __init__(self, d_model, max_seq_len, marker: str = ""):
        super().__init__()
        self.linear, self.marker, self.calls = nn.Linear(d_model, d_model), Path(marker), 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 9 and not self.marker.exists():
            self.marker.touch()
            raise RuntimeError("CUDA error: MPS client has been terminated by the server\\nmore")
        return self.linear(x)
"""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A CPU for each worker, however few the machine has."""
    pytest.importorskip("ray")
    with connected(num_cpus=NUM_WORKERS) as module:
        yield module


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


def test_workers_know_a_task_of_the_users_own(ray, tmp_path):
    source = (REPOSITORY / "tests" / "tasks" / "own.py").read_text()
    (tmp_path / "own.py").write_text(source)
    of = import_file(tmp_path / "own.py").First(seq_len=8, vocab_size=16)
    (tmp_path / "own.py").unlink()  # what was read holds, here and there
    run = dataclasses.replace(RUNS[0], data=Data.of(of, train=64, valid=16, test=16))
    (here,) = sweep([run], Store(tmp_path / "here"), Notes(), SweepOptions(**OPTIONS))
    (there,) = sweep([run], Store(tmp_path / "ray"), Notes(), SweepOptions(**ON_RAY))
    assert there.hash == here.hash == run.hash
    assert there.test_accuracy == here.test_accuracy


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


def test_a_worker_that_lost_its_service_is_made_anew_and_its_pack_goes_on(ray, tmp_path):
    (tmp_path / "once.py").write_text(SERVICE_GONE)
    marker = tmp_path / "gone"
    once = mixer(f"{tmp_path}/once.py:Once", marker=str(marker))
    model = ModelConfig(mixers=(once,), d_model=16, num_layers=1)
    run = dataclasses.replace(RUNS[0], model=model)
    marker.touch()
    (wanted,) = sweep([run], Store(tmp_path / "here"), Notes(), SweepOptions(**OPTIONS))
    marker.unlink()
    watcher = Notes()
    (found,) = sweep([run], Store(tmp_path / "ray"), watcher, SweepOptions(**ON_RAY))
    (warning,) = [w for w in watcher.warnings if "worker was lost" in w]
    assert warning.endswith("CUDA error: MPS client has been terminated by the server")
    assert (found.test_accuracy, found.metrics) == (wanted.test_accuracy, wanted.metrics)


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
    # A busy machine takes its time to start workers, which is told.
    told = [w for w in watcher.warnings if "has taken a pack" not in w]
    assert told == ["out of memory with 2 runs in a pack; going on with 1."]
    [call] = read_json(tmp_path / "o" / "sweep.json")["calls"]
    assert (call["outcome"], call["num_runs_trained"]) == ("UserError", 0)


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


def test_a_pack_that_takes_down_every_worker_is_given_up(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "MOST_LOSSES", 2)  # as each costs a worker's start
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


class Hurry(Notes):
    """Lets all but a few seconds of an hour pass when a first run is finished, so that the time
    that workers take to start does not matter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.ahead = 0.0
        clock = SimpleNamespace(time=time.time, sleep=time.sleep)
        clock.monotonic = lambda: time.monotonic() + self.ahead
        monkeypatch.setattr(on_ray, "time", clock)
        self.began = time.monotonic()

    def run_finished(self, result: Result) -> None:
        super().run_finished(result)
        if not self.ahead:
            self.ahead = 3600 - SECONDS_LEFT - (time.monotonic() - self.began)


def test_workers_stop_at_a_checkpoint_when_time_is_up(ray, tmp_path, monkeypatch):
    budget = Budget(num_epochs=20_000, batch_size=32, stop_accuracy=None)  # minutes
    data = Data.of(TASK, train=64, valid=8, test=8)
    # Two that diverge at once, of widths at which they would take longest and so come first.
    of = [(1e30, 256), (1e30, 128), (1e-3, 64), (1e-3, 32), (1e-3, 16)]
    runs = [dataclasses.replace(run_of(*one), data=data, budget=budget) for one in of]
    watcher = Hurry(monkeypatch)
    options = SweepOptions(
        executor="ray", device="cpu", devices=1, packs_per_device=2, seconds=3600
    )
    results = sweep(runs, Store(tmp_path), watcher, options)
    assert time.monotonic() + watcher.ahead - watcher.began < 3600 + 30
    assert [result.status for result in results] == ["diverged"] * len(results)
    assert results
    assert read_json(tmp_path / "sweep.json")["calls"][-1]["outcome"] == "out of time"
    kept = list((tmp_path / "packs").glob("*/checkpoint.safetensors"))
    assert 1 <= len(kept) <= 2, "the last pack was never begun"


@pytest.mark.parametrize(("device", "said"), [("cuda", "no GPU"), ("cuda:1", "names one device")])
def test_a_device_that_the_cluster_lacks_is_named(ray, tmp_path, device, said):
    with pytest.raises(UserError, match=said):
        sweep(RUNS, Store(tmp_path), Notes(), SweepOptions(**{**ON_RAY, "device": device}))


def test_tasks_count_pairs_as_threads_do(ray, tmp_path):
    tables = []
    for executor in ("threads", "ray"):
        data = write_data(tmp_path / executor, zipf_documents(1, 30, 300), 300, name="same")
        count_pairs(data, memory_mib=0.4, workers=2, executor=executor, progress=False)
        folder = data.folder / "pair_counts"
        tables.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert tables[0] == tables[1]
