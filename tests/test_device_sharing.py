"""How packs share a GPU: NVIDIA's Multi-Process Service, which a sweep starts and ends.

A script stands for the service, and another for a GPU that answers through it: CI has neither.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweeps import ON_RAY, RUNS, Notes

from recallzoo.cli import _probes
from recallzoo.errors import InvalidConfig, UserError
from recallzoo.executors import _mps, on_ray
from recallzoo.executors._mps import CONTROL, DEVICES, PIPES, enter, is_lost, mps
from recallzoo.executors.on_ray import RayOptions
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, sweep

SERVICE = """#!{python}
import os, pathlib, sys, time
pipes, log = (pathlib.Path(os.environ[n]) for n in ("{pipes}", "CUDA_MPS_LOG_DIRECTORY"))
if sys.argv[1:] == ["-f"]:
    print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), file=open(log / "control.log", "w"))
    (pipes / "control").touch()
    while not (pipes / "quit").exists():
        time.sleep(0.02)
elif sys.stdin.read().startswith("quit"):
    (pipes / "quit").touch()
"""
ANSWERS = "import sys; sys.exit(0)"
FAILS = "import sys; sys.exit('CUDA error 805')"


@pytest.fixture
def service(tmp_path, monkeypatch) -> Path:
    """On PATH, and nothing of another one in the environment."""
    path = tmp_path / "bin" / CONTROL
    path.parent.mkdir()
    path.write_text(SERVICE.format(python=sys.executable, pipes=PIPES))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    for name in (PIPES, DEVICES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_mps, "DEFAULT_PIPES", tmp_path / "none")
    monkeypatch.setattr(_mps, "_TRY", ANSWERS)
    return path


def number_of_services(path: Path) -> int:
    """Processes of this script that run."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += str(path).encode() in (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
    return found


def options(**changed: object) -> RayOptions:
    usual = {"address": None, "device": "auto", "most_devices": None, "packs_per_device": 4}
    rest = {"sharing": "auto", "compiled": None, "checkpoint_seconds": 1.0}
    return RayOptions(**{**usual, **rest, **changed})


def test_the_service_is_there_for_what_is_started_within_and_gone_afterwards(service, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    before = dict(os.environ)
    with mps():
        folder = Path(os.environ[PIPES])
        assert folder.is_dir()
        assert os.environ[DEVICES] == "2,3"
        assert number_of_services(service) == 1
    assert dict(os.environ) == before
    assert number_of_services(service) == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("seen", "mine", "inside"),
    [
        ("2,3", "3", "1"),
        ("2,3", "2", "0"),
        ("", "1", "1"),
        ("1,0", "1", "0"),
        ("GPU-a,GPU-b", "GPU-b", "1"),
    ],
)
def test_a_worker_names_its_device_as_the_service_counts(monkeypatch, seen, mine, inside):
    monkeypatch.setenv(DEVICES, seen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mine)
    for _ in range(2):
        enter()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == inside


def test_a_service_that_no_gpu_answers_through_is_ended_and_told(service, monkeypatch):
    monkeypatch.setattr(_mps, "_TRY", FAILS)
    before = dict(os.environ)
    with pytest.raises(UserError, match=r"does not start: CUDA error 805 \(sees None\)"), mps():
        raise AssertionError("it was entered")
    assert dict(os.environ) == before
    assert number_of_services(service) == 0


def test_a_service_ends_with_a_process_that_is_killed(service):
    source = (
        "from recallzoo.executors import _mps\n"
        f"_mps._TRY = {ANSWERS!r}\n"
        "import os, signal\n"
        "with _mps.mps():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == -9
    until = time.monotonic() + 20
    while number_of_services(service) and time.monotonic() < until:
        time.sleep(0.05)
    assert number_of_services(service) == 0


def test_one_that_runs_already_is_used_as_it_is(service, monkeypatch):
    monkeypatch.setenv(PIPES, "/somewhere")
    with mps():
        assert os.environ[PIPES] == "/somewhere"
        assert number_of_services(service) == 0


def entered(of: RayOptions) -> tuple[str | None, tuple[str, ...]]:
    with on_ray.ExitStack() as stack:
        return on_ray._enter_sharing(stack, of)


def test_packs_share_at_once_where_they_can_and_in_turns_where_not(service, monkeypatch):
    monkeypatch.setattr(on_ray, "is_connected", lambda: False)  # by other tests
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert entered(options()) == ("mps", ())
    assert entered(options(sharing="turns")) == ("turns", ())
    assert entered(options(packs_per_device=1)) == (None, ())
    assert entered(options(device="cpu")) == (None, ())
    assert entered(options(address="host:1")) == (None, ())
    with pytest.raises(UserError, match="before `ray start`"):
        entered(options(address="host:1", sharing="mps"))
    monkeypatch.setattr(_mps, "_TRY", FAILS)
    sharing, (note,) = entered(options())
    assert sharing == "turns"
    assert "packs take turns on a GPU" in note
    assert "805" in note
    with pytest.raises(UserError, match="805"):
        entered(options(sharing="mps"))
    service.unlink()
    assert entered(options()) == ("turns", ())
    with pytest.raises(UserError, match=f"{CONTROL}.* is not on PATH"):
        entered(options(sharing="mps"))


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


def test_errors_of_the_service_are_known():
    assert is_lost(RuntimeError("CUDA error: MPS client has been terminated by the server"))
    assert not is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_lost(ValueError("MPS"))


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
