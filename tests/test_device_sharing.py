"""How packs share a GPU: at once, through NVIDIA's Multi-Process Service, or in turns."""

import os
from unittest.mock import MagicMock

import pytest
from sweeps import ON_RAY, RUNS, Notes

from recallzoo.cli import _probes
from recallzoo.errors import InvalidConfig, UserError
from recallzoo.executors import _worker, on_ray
from recallzoo.executors._mps import DEVICES
from recallzoo.executors._worker import Outcome, PackWorker, WorkerOptions
from recallzoo.executors.on_ray import RayOptions
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, sweep


@pytest.fixture
def worker_options(monkeypatch) -> WorkerOptions:
    monkeypatch.setattr(_worker, "_threads_here", lambda _: 1)
    monkeypatch.setenv(_worker.COMPILE_THREADS, "1")
    monkeypatch.setattr(_worker, "module_of", lambda *_: None)
    usual = {"folder": "", "device": "cpu", "compiled": None, "checkpoint_seconds": 0.0}
    rest = {"packs_per_device": 2, "most_devices": None, "version": "", "files": (("a.py", b""),)}
    return WorkerOptions(**usual, **rest)


def test_a_users_file_finds_the_device_named_as_the_service_counts(worker_options, monkeypatch):
    monkeypatch.setenv(DEVICES, "2,3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    seen = []
    monkeypatch.setattr(
        _worker, "module_of", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    )
    PackWorker(worker_options, MagicMock())
    assert seen == ["1"]


def test_a_worker_that_lost_its_service_asks_nothing_more_of_its_device(
    worker_options, monkeypatch
):
    def fails(_: object) -> None:
        raise RuntimeError("CUDA error: MPS client has been terminated by the server")

    worker = PackWorker(worker_options, MagicMock())
    monkeypatch.setattr(_worker, "free_memory", fails)
    monkeypatch.setattr(PackWorker, "_train", lambda *_: Outcome("lost", "gone"))
    assert worker.train("name", [], None) == Outcome("lost", "gone")


def test_the_doctor_tries_the_service(service, monkeypatch):
    monkeypatch.setattr(_probes, "_require_cuda", lambda _: None)
    found = _probes.probe("sharing", _probes.device_sharing)
    assert (found.works, number_of_services(service)) == (True, 0)
    monkeypatch.setattr(_mps, "_TRY", FAILS)
    found = _probes.probe("sharing", _probes.device_sharing)
    assert not found.works
    assert "does not start: CUDA error 805" in found.detail


@pytest.mark.parametrize(
    "changed",
    [
        {"executor": "local", "device_sharing": "mps"},
        {**ON_RAY, "device_sharing": "mps", "device": "auto"},
        {**ON_RAY, "device_sharing": "mps", "packs_per_device": 2},
        {**ON_RAY, "device_sharing": "both"},
    ],
)
def test_sharing_that_would_be_ignored_is_refused(changed):
    with pytest.raises(InvalidConfig, match="device_sharing"):
        SweepOptions(**changed)


def test_a_cluster_without_a_gpu_has_nothing_to_share(tmp_path, monkeypatch):
    seen = []

    class Cluster:
        def __init__(self, ray: object, of: RayOptions, *rest: object) -> None:
            seen.append((of.sharing, *rest))
            raise UserError("no further")

    monkeypatch.setattr(on_ray, "RayExecutor", Cluster)
    monkeypatch.setattr(on_ray, "connected", lambda *_: on_ray.ExitStack())
    with pytest.raises(UserError, match="no further"):
        sweep(RUNS, Store(tmp_path), Notes(), SweepOptions(**ON_RAY))
    assert seen == [("auto", None, ())]
