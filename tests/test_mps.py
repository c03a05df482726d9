"""NVIDIA's Multi-Process Service is started and ended, and leaves nothing behind."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mps_service import ANSWERS, FAILS, number_of_services, put_on_path

from recallzoo.errors import UserError
from recallzoo.executors import _mps
from recallzoo.executors._mps import DEVICES, PIPES, enter, is_lost, mps

COMMAND = f"""
import os, signal, time
from pathlib import Path
from recallzoo import interrupts
from recallzoo.executors import _mps

_mps._TRY, _mps.DEFAULT_PIPES = {ANSWERS!r}, Path("none")
interrupts.ENDING_SECONDS = 1.0

def main():
    with _mps.mps():
        print("entered", flush=True)
        os.kill(os.getpid(), signal.{{number}})
        time.sleep(60)

interrupts.run_process(main)
"""


@pytest.fixture
def service(tmp_path, monkeypatch) -> Path:
    return put_on_path(tmp_path, monkeypatch)


@pytest.fixture
def short_folder(monkeypatch) -> Iterator[Path]:
    """Temporary folder of processes that a test starts."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def stopped_by(number: str) -> int:
    """Exit code of a process that has the service when a signal comes."""
    command = [sys.executable, "-c", COMMAND.format(number=number)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert ended.stdout == "entered\n"
    return ended.returncode


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
    assert not folder.parent.exists()


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


def test_a_service_ends_with_a_process_that_is_killed(service, short_folder):
    assert stopped_by("SIGKILL") == -9
    until = time.monotonic() + 20
    while number_of_services(service) and time.monotonic() < until:
        time.sleep(0.05)
    assert number_of_services(service) == 0


def test_a_service_whose_process_was_killed_before_it_began_does_not_begin():
    command = [sys.executable, "-c", _mps._END_WITH_PARENT, str(os.getppid()), "echo", "here"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b""
    command[3] = str(os.getpid())
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"here\n"


def test_a_command_that_is_stopped_waits_for_its_service(service, short_folder, monkeypatch):
    monkeypatch.setenv("QUIT_SECONDS", "2.5")
    assert stopped_by("SIGTERM") == 130
    assert not list(short_folder.iterdir())
    assert number_of_services(service) == 0


def test_ctrl_c_while_the_service_ends_leaves_nothing_behind(service, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def interrupted_at_the_end() -> None:
        with mps():
            folders.append(Path(os.environ[PIPES]).parent)
            monkeypatch.setattr(subprocess, "run", interrupted)

    before, folders = dict(os.environ), list[Path]()
    with pytest.raises(KeyboardInterrupt):
        interrupted_at_the_end()
    assert dict(os.environ) == before
    assert number_of_services(service) == 0
    assert not folders[0].exists()


def test_one_that_runs_already_is_used_as_it_is(service, monkeypatch, tmp_path):
    monkeypatch.setenv(PIPES, str(tmp_path))
    with mps():
        assert os.environ[PIPES] != str(tmp_path)  # nothing runs there
        assert number_of_services(service) == 1
    (tmp_path / "control").touch()
    with mps():
        assert os.environ[PIPES] == str(tmp_path)
        assert number_of_services(service) == 0


def test_where_no_service_can_be_looked_for_there_is_none(service, monkeypatch):
    monkeypatch.setattr(_mps, "DEFAULT_PIPES", Path("/", "x" * 300))  # as one of another user's
    with mps():
        assert number_of_services(service) == 1


@pytest.mark.parametrize("name", ["x" * 80, "not-there"])
def test_a_temporary_folder_that_does_not_do_is_told(service, monkeypatch, tmp_path, name):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    with pytest.raises(UserError, match="set TMPDIR to a"), mps():
        raise AssertionError("it was entered")
    assert not list(long.iterdir())
    assert number_of_services(service) == 0


def test_errors_of_the_service_are_known():
    assert is_lost(RuntimeError("CUDA error: MPS client has been terminated by the server"))
    assert is_lost(RuntimeError("Error 807: MPS server is not ready to accept new MPS client"))
    assert not is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(NotImplementedError, match="MPS") as raised:  # Apple's, among its backends
        torch.ones(2).to_sparse().unfold(0, 1, 1)
    assert not is_lost(raised.value)
