"""How packs share a GPU: at once, through NVIDIA's Multi-Process Service, or in turns."""

import os
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from mps_service import FAILS, number_of_services, put_on_path
from sweeps import ON_RAY, RUNS, Notes

from recallzoo.cli import _probes
from recallzoo.errors import InvalidConfig, StoreError, UserError
from recallzoo.executors import _mps, _worker, on_ray
from recallzoo.executors._mps import CONTROL, DEVICES, PIPES
from recallzoo.executors._worker import Outcome, PackWorker, WorkerOptions
from recallzoo.executors.on_ray import RayExecutor, RayOptions
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, sweep


@pytest.fixture
def service(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(on_ray, "is_connected", lambda: False)  # by other tests
    return put_on_path(tmp_path, monkeypatch)


def options(**changed: object) -> RayOptions:
    usual = {"address": None, "device": "auto", "most_devices": None, "packs_per_device": 4}
    rest = {"sharing": "auto", "compiled": None, "checkpoint_seconds": 1.0}
    return RayOptions(**{**usual, **rest, **changed})


def entered(of: RayOptions) -> tuple[str | None, tuple[str, ...]]:
    with on_ray.ExitStack() as stack:
        return on_ray._enter_sharing(stack, of)


def test_packs_share_at_once_where_they_can_and_in_turns_where_not(service, monkeypatch):
    assert entered(options()) == ("mps", ())
    assert entered(options(address="local")) == ("mps", ())
    assert entered(options(sharing="turns")) == ("turns", ())
    assert entered(options(packs_per_device=1)) == (None, ())
    assert entered(options(device="cpu")) == (None, ())
    monkeypatch.setattr(_mps, "_TRY", FAILS)
    sharing, (note,) = entered(options())
    assert sharing == "turns"
    assert "packs take turns on a GPU" in note
    assert "805" in note
    with pytest.raises(UserError, match=r"805.* Leave the option out"):
        entered(options(sharing="mps"))
    service.unlink()
    assert entered(options()) == ("turns", ())
    with pytest.raises(UserError, match=f"{CONTROL}.* is not on PATH"):
        entered(options(sharing="mps"))


def test_on_a_cluster_that_exists_nothing_is_started_and_a_choice_is_refused(service, monkeypatch):
    assert entered(options(address="host:1")) == (None, ())
    for sharing in ("mps", "turns"):
        with pytest.raises(UserError, match=rf"--device-sharing {sharing} .* before `ray start`"):
            entered(options(address="host:1", sharing=sharing))
    monkeypatch.setenv("RAY_ADDRESS", "host:1")
    assert entered(options()) == (None, ())
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert entered(options()) == ("mps", ())
    monkeypatch.setattr(on_ray, "is_connected", lambda: True)
    assert entered(options()) == (None, ())


def test_packs_do_not_take_turns_where_a_service_of_the_users_own_runs(
    service, monkeypatch, tmp_path
):
    monkeypatch.setattr(shutil, "which", lambda _: None)  # in a container it may run outside
    monkeypatch.setenv(PIPES, str(tmp_path))
    assert entered(options(sharing="turns")) == ("turns", ())
    (tmp_path / "control").touch()
    assert entered(options()) == ("mps", ())
    with pytest.raises(UserError, match=f"turns: .* runs here.* empty folder in {PIPES}"):
        entered(options(sharing="turns"))


def test_without_a_gpu_nothing_is_said_of_sharing_unless_it_was_asked_for(tmp_path):
    ray, watcher = MagicMock(), Notes()
    ray.cluster_resources.return_value = {"CPU": 2.0}
    executor = RayExecutor(ray, options(), "turns", ("packs take turns",))
    executor.train([], Store(tmp_path), watcher, lambda *_: [])
    assert (executor.sharing, watcher.warnings) == (None, [])
    with pytest.raises(UserError, match="--device-sharing mps is for packs on a GPU"):
        RayExecutor(ray, options(sharing="mps"), "mps", ())
    ray.cluster_resources.return_value = {"CPU": 2.0, "GPU": 1.0}
    executor = RayExecutor(ray, options(), "turns", ("packs take turns",))
    executor.train([], Store(tmp_path), watcher, lambda *_: [])
    assert (executor.sharing, watcher.warnings) == ("turns", ["packs take turns"])


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


def test_the_doctor_tries_the_service(service, tmp_path, monkeypatch):
    monkeypatch.setattr(_probes, "_require_cuda", lambda _: None)
    found = _probes.probe("sharing", _probes.device_sharing)
    assert (found.works, number_of_services(service)) == (True, 0)
    monkeypatch.setattr(_mps, "_TRY", FAILS)
    found = _probes.probe("sharing", _probes.device_sharing)
    assert not found.works
    assert "does not start: CUDA error 805" in found.detail
    monkeypatch.setattr(_mps, "DEFAULT_PIPES", tmp_path)
    (tmp_path / "control").touch()
    found = _probes.probe("sharing", _probes.device_sharing)
    assert (found.works, "somebody else" in found.detail) == (True, True)


@pytest.mark.parametrize(
    "changed",
    [
        {"executor": "local", "device_sharing": "mps"},
        {**ON_RAY, "device_sharing": "mps", "device": "auto"},
        {**ON_RAY, "device_sharing": "mps", "packs_per_device": 2},
        {**ON_RAY, "device_sharing": "turns", "packs_per_device": 2},
        {**ON_RAY, "device_sharing": "both"},
    ],
)
def test_sharing_that_would_be_ignored_is_refused(changed):
    with pytest.raises(InvalidConfig, match="device_sharing"):
        SweepOptions(**changed)


def test_a_pack_is_not_blamed_alone_for_workers_that_are_lost_together(tmp_path):
    def given_up(**how: bool) -> str:
        pack = on_ray._Training("p", RUNS[:1], Notes(), MagicMock())
        losses = on_ray._Losses(Store(tmp_path), **how)
        for _ in range(on_ray.MOST_LOSSES - 1):
            losses.add(pack, "gone.")
        with pytest.raises(StoreError) as raised:
            losses.add(pack, "gone.")
        return str(raised.value)

    assert "--device-sharing turns tells which pack it is" in given_up(share_a_gpu=True)
    assert "--device-sharing" not in given_up(share_a_gpu=False)


def test_a_lost_workers_message_is_without_rays_guesses():
    guesses = "Some common causes include: (1) the process was killed by the OOM killer"
    error = RuntimeError(f"The actor died.\nWorker exit type: SYSTEM_ERROR End of file. {guesses}")
    assert on_ray._last_line(error) == "Worker exit type: SYSTEM_ERROR End of file."


def test_what_was_chosen_reaches_the_cluster(service, tmp_path, monkeypatch):
    seen = []

    class Cluster:
        def __init__(self, ray: object, of: RayOptions, *rest: object) -> None:
            seen.append((of.sharing, *rest))
            raise UserError("no further")

    monkeypatch.setattr(on_ray, "RayExecutor", Cluster)
    monkeypatch.setattr(on_ray, "connected", lambda *_: on_ray.ExitStack())
    chosen = {"device": "auto", "packs_per_device": 2, "device_sharing": "turns"}
    given = SweepOptions(**{**ON_RAY, **chosen})
    with pytest.raises(UserError, match="no further"):
        sweep(RUNS, Store(tmp_path / "o"), Notes(), given)
    assert seen == [("turns", "turns", ())]
