"""Sweeps on a Ray cluster: options, what is told where there is none, and how packs share it."""

import socket
import sys
from typing import Any

import pytest
from sweeps import NUM_WORKERS, ON_RAY, RUNS, Notes, run_of

from recallzoo.errors import InvalidConfig, UserError
from recallzoo.executors import on_ray
from recallzoo.executors._lanes import share_of_one
from recallzoo.executors._worker import WorkerOptions, compile_threads
from recallzoo.executors.on_ray import longest_first
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, sweep


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
    monkeypatch.setattr(module, "is_initialized", lambda: False)  # by other tests
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = SweepOptions(**{**ON_RAY, "ray_address": f"127.0.0.1:{port}"})
    with pytest.raises(UserError, match=f"no Ray cluster answers at '127.0.0.1:{port}'"):
        sweep(RUNS, Store(tmp_path), Notes(), options)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'recallzoo\[ray\]'"):
        sweep(RUNS, Store(tmp_path / "o"), Notes(), SweepOptions(**ON_RAY))


def test_a_cluster_that_a_sweep_starts_has_a_cpu_for_each_device(tmp_path, monkeypatch):
    def start(address: str | None, num_cpus: int | None, instead: str) -> None:
        raise UserError(f"{num_cpus} CPUs at {address}")

    monkeypatch.setattr(on_ray, "connected", start)
    with pytest.raises(UserError, match=f"{NUM_WORKERS} CPUs at None"):
        sweep(RUNS, Store(tmp_path), Notes(), SweepOptions(**ON_RAY))


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
