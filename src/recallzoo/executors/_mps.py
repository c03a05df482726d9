"""One GPU for several processes at once: NVIDIA's Multi-Process Service, started here and ended.

Processes that share a GPU take turns on it, each with the whole GPU for its turn, so that kernels
which are too small to fill it leave part of it idle. Through the service their kernels run beside
one another.

    with mps():
        ...     # processes started here use this machine's GPUs through it

A process that is killed while it computes may take others of the service with it, which then fail
with errors that `is_lost` knows.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recallzoo.errors import UserError

CONTROL = "nvidia-cuda-mps-control"
PIPES, DEVICES = "CUDA_MPS_PIPE_DIRECTORY", "RECALLZOO_MPS_DEVICES"
DEFAULT_PIPES = Path("/tmp/nvidia-mps")
"""Where CUDA looks for the service if nothing says otherwise."""
START_SECONDS, END_SECONDS = 60.0, 20.0

_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""PR_SET_PDEATHSIG: the service must not outlive a sweep that is killed."""

_TRY = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
context, device = ctypes.c_void_p(), ctypes.c_int()
error = cuda.cuInit(0)
error = error or cuda.cuDeviceGet(ctypes.byref(device), 0)
error = error or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
sys.exit(f"CUDA error {error}" if error else 0)
"""


class NoService(UserError):
    """The service is not there, or does not start."""


@contextmanager
def mps() -> Iterator[None]:
    """Have processes that are started within use this machine's GPUs through the service, which
    ends afterwards. One that runs already is used as it is. Raises NoService."""
    if PIPES in os.environ or (DEFAULT_PIPES / "control").exists():
        yield
        return
    control = shutil.which(CONTROL)
    if control is None:
        raise NoService(f"{CONTROL}, which comes with NVIDIA's driver, is not on PATH")
    with tempfile.TemporaryDirectory(prefix="recallzoo-mps-") as folder:
        pipes, log = Path(folder, "pipes"), Path(folder, "log")
        pipes.mkdir()
        log.mkdir()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        # The service counts the devices that it sees from zero; `enter` does likewise.
        changed = {PIPES: str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(log), DEVICES: visible or ""}
        before = {name: os.environ.get(name) for name in changed}
        service = subprocess.Popen(
            [sys.executable, "-c", _END_WITH_PARENT, control, "-f"],
            env={**os.environ, **changed},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends the workers first
        )
        os.environ.update(changed)
        try:
            _require_device(service, pipes, log)
            yield
        finally:
            _end(service, control)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def is_here() -> bool:
    """Whether this machine has the service."""
    return shutil.which(CONTROL) is not None


def enter() -> None:
    """In a process that is to use CUDA, before it does: name its device as the service counts.
    Does nothing where there is none of ours, nor again."""
    seen = os.environ.pop(DEVICES, "")
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if seen and mine:
        places = seen.split(",")
        inside = [str(places.index(one)) for one in mine.split(",") if one in places]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(inside)


def is_lost(error: BaseException) -> bool:
    """Whether an error of CUDA says that the service ended a process or went away, rather than
    that the process did something wrong."""
    return isinstance(error, RuntimeError) and "MPS" in str(error)


def _require_device(service: subprocess.Popen[bytes], pipes: Path, log: Path) -> None:
    """NoService if no GPU answers through it."""
    until = time.monotonic() + START_SECONDS
    # Before its pipes are there, CUDA would go by without it.
    while not any(pipes.iterdir()) and service.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    environment = dict(os.environ)
    if environment.get(DEVICES):
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    command = [sys.executable, "-c", _TRY]
    try:
        tried = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=START_SECONDS
        )
    except subprocess.TimeoutExpired:
        reason = f"no GPU answers through it within {START_SECONDS:.0f} s"
    else:
        if tried.returncode == 0 and service.poll() is None:
            return
        reason = (tried.stderr.strip().splitlines() or [f"{CONTROL} ended"])[-1]
    raise NoService(f"NVIDIA's Multi-Process Service does not start: {reason}{_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = [
        line
        for path in sorted(log.glob("*.log"))
        for line in path.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    return f" ({lines[-1].strip()})" if lines else ""


def _end(service: subprocess.Popen[bytes], control: str) -> None:
    """Ask it to end, which ends its servers too, and see that it does."""
    if service.poll() is None:
        command = [control]
        try:
            subprocess.run(
                command, input=b"quit -t 5\n", capture_output=True, timeout=END_SECONDS, check=False
            )
            service.wait(END_SECONDS)
        except (subprocess.TimeoutExpired, OSError):
            service.kill()
    service.wait()
