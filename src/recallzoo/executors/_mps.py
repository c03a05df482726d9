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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recallzoo.errors import UserError
from recallzoo.interrupts import allow
from recallzoo.variables import environment_with

CONTROL = "nvidia-cuda-mps-control"
PIPES, DEVICES = "CUDA_MPS_PIPE_DIRECTORY", "RECALLZOO_MPS_DEVICES"
DEFAULT_PIPES = Path("/tmp/nvidia-mps")
"""Where CUDA looks for the service if nothing says otherwise."""
PIPES_SECONDS, ANSWER_SECONDS, END_SECONDS = 10.0, 60.0, 20.0
LONGEST_PIPE, MOST_BYTES = "control_privileged", 107
"""What the address of a socket may have."""

_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""PR_SET_PDEATHSIG: the service must not outlive a sweep that is killed, from now on or before."""

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
    if is_running():
        yield
        return
    control = shutil.which(CONTROL)
    if control is None:
        raise NoService(f"{CONTROL}, which comes with NVIDIA's driver, is not on PATH")
    with _new_folder() as folder:
        pipes, log = Path(folder, "pipes"), Path(folder, "log")
        if len(os.fsencode(pipes / LONGEST_PIPE)) > MOST_BYTES:
            raise NoService(f"{folder} is too long for its pipes: set TMPDIR to a shorter folder")
        # The service counts the devices that it sees from zero; `enter` does likewise.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        changed = {PIPES: str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(log), DEVICES: visible}
        with environment_with(**changed):
            service = subprocess.Popen(
                [sys.executable, "-c", _END_WITH_PARENT, str(os.getpid()), control, "-f"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C ends the workers first
            )
            try:
                _require_device(service, pipes, log)
                yield
            finally:
                _end(service, control)


def is_here() -> bool:
    """Whether this machine has the service."""
    return is_running() or shutil.which(CONTROL) is not None


def is_running() -> bool:
    """Whether CUDA finds one here that somebody else started."""
    return os.access(Path(os.environ.get(PIPES) or DEFAULT_PIPES, "control"), os.F_OK)


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
    # PyTorch lists MPS, Apple's, among its backends when an operator has none for CUDA.
    return re.search(r"\bMPS (client|server)\b", str(error)) is not None


def _new_folder() -> tempfile.TemporaryDirectory[str]:
    """For pipes and logs. NoService if there is no place for it."""
    try:
        # What a server that is killed still writes must not end the sweep.
        folder = tempfile.TemporaryDirectory(prefix="recallzoo-mps-", ignore_cleanup_errors=True)
        for name in ("pipes", "log"):
            Path(folder.name, name).mkdir()
    except OSError as error:
        raise NoService(f"{error}: set TMPDIR to a folder that can be written to") from error
    return folder


def _require_device(service: subprocess.Popen[bytes], pipes: Path, log: Path) -> None:
    """NoService if no GPU answers through it."""
    until = time.monotonic() + PIPES_SECONDS
    # Before its pipes are there, CUDA would go by without it.
    control = pipes / "control"
    while not control.exists() and service.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    environment = dict(os.environ)
    if environment.get(DEVICES):
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    command = [sys.executable, "-c", _TRY]
    try:
        tried = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        reason = f"no GPU answers through it within {ANSWER_SECONDS:.0f} s"
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
    """Ask it to end, which ends its servers too, and see that it does, interrupted or not."""
    allow(2 * END_SECONDS)
    try:
        with suppress(subprocess.TimeoutExpired, OSError):
            if service.poll() is None:
                words = b"quit -t 5\n"
                command = [control]
                subprocess.run(
                    command, input=words, capture_output=True, timeout=END_SECONDS, check=False
                )
                service.wait(END_SECONDS)
    finally:
        if service.poll() is None:
            os.killpg(service.pid, signal.SIGKILL)
        service.wait()
