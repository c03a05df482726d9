"""What a worker of a cluster does: train packs, one after another, into the shared folder."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from recallzoo._version import __version__
from recallzoo.devices import is_out_of_memory
from recallzoo.errors import RecallzooError, UserError
from recallzoo.executors import _mps
from recallzoo.executors.devices import free_memory, memory_for_packs
from recallzoo.heap import keep_freed_memory
from recallzoo.mixers._user_file import find_beside, module_of
from recallzoo.run import Run
from recallzoo.store import Store
from recallzoo.train.packed import Pack, PackOptions

COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
MEMORY_IN_ALL = 0.95
"""Share of a GPU's memory that the packs on it may take together; each process has a context
of its own beside it."""


@dataclass(frozen=True)
class Outcome:
    """How a pack ended. Errors travel as text, as not every exception survives the journey."""

    what: Literal["done", "out of time", "out of memory", "failed", "lost"]
    message: str = ""
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What all packs of a sweep have in common."""

    folder: str
    device: Literal["cpu", "cuda"]
    compiled: bool | None
    checkpoint_seconds: float
    packs_per_device: int
    most_devices: int | None
    version: str
    """Of recallzoo where the sweep was started."""
    files: tuple[tuple[str, bytes], ...] = ()
    """Path and content of the files that tasks of a user's own are from."""


class PackWorker:
    """A process that has its share of a device for as long as the sweep needs it. A Ray actor.

    It stays on its device: CUDA, once used, cannot be moved to another GPU.
    """

    def __init__(self, options: WorkerOptions, mailbox: Any) -> None:
        self._options, self._mailbox = options, mailbox
        keep_freed_memory()
        _mps.enter()
        for path, source in options.files:  # before a pack arrives that is made of them
            find_beside(Path(path))
            module_of(source, Path(path))
        _limit_compile_threads(_threads_here(options))
        if options.device == "cuda":
            torch.cuda.init()  # a machine that cannot is told of before it has a pack
        if options.device == "cuda" and options.packs_per_device > 1:
            # So that a pack that is too large is halved, not the one that happened to be beside.
            torch.cuda.set_per_process_memory_fraction(MEMORY_IN_ALL / options.packs_per_device)

    def train(self, name: str, runs: list[Run], ends_at: float | None) -> Outcome:
        """Train a pack to its end, or go on from its checkpoint; until that time of day at most:
        of time that is left a worker would not know how much its start took."""
        deadline = None if ends_at is None else time.monotonic() + ends_at - time.time()
        self._mailbox.put.remote(name, None)
        outcome = self._train(name, runs, deadline)
        if outcome.what != "lost":  # after which the device answers with errors alone
            free_memory(torch.device(self._options.device))
        return outcome

    def _train(self, name: str, runs: list[Run], deadline: float | None) -> Outcome:
        """Each result is in the store before training goes on, as the next checkpoint will not
        know of it."""
        options = self._options
        try:
            _require_same_version(options.version)
            store = _open(options.folder)
            pack_folder = store.folder / "packs" / name
            pack = Pack(
                runs,
                options.device,
                PackOptions(
                    compiled=options.compiled,
                    checkpoint=pack_folder / "checkpoint.safetensors",
                    checkpoint_seconds=options.checkpoint_seconds,
                    on_progress=lambda progress: self._mailbox.put.remote(name, progress),
                    deadline=deadline,
                ),
            )
            for result in pack.train():
                store.write(result)
        except RecallzooError as error:
            return Outcome("failed", f"{error} (worker on {socket.gethostname()})", error.exit_code)
        except Exception as error:
            if is_out_of_memory(error):
                return Outcome("out of memory")
            if _mps.is_lost(error):
                return Outcome("lost", str(error).splitlines()[0])
            raise
        if not pack.is_done:
            return Outcome("out of time")
        shutil.rmtree(pack_folder, ignore_errors=True)
        return Outcome("done")


def memory_on_worker(device: str) -> float:
    """Bytes for packs on the worker's device."""
    _mps.enter()
    return memory_for_packs(torch.device(device))


def compile_threads(resources: Mapping[str, float], options: WorkerOptions) -> int:
    """Threads that compile for one pack, so that all packs of a machine with these resources
    compile at once on its CPUs: CPUs / (devices x packs per device)."""
    devices = resources.get("GPU" if options.device == "cuda" else "CPU", 1.0)
    devices = min(devices, options.most_devices or devices)
    return max(1, int(resources.get("CPU", 1.0) / (devices * options.packs_per_device)))


def _threads_here(options: WorkerOptions) -> int:
    import ray

    here = ray.get_runtime_context().get_node_id()
    return compile_threads(
        next(n for n in ray.nodes() if n["NodeID"] == here)["Resources"], options
    )


def _limit_compile_threads(number: int) -> None:
    """Unless whoever started the cluster, or this sweep on a machine of its own, set them. OpenMP
    has one thread in a worker that has one CPU or less: Ray sees to that."""
    if COMPILE_THREADS in os.environ:
        return
    os.environ[COMPILE_THREADS] = str(number)
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:  # which read the environment when it was loaded
        config.compile_threads = number


def _open(folder: str) -> Store:
    if not (Path(folder) / "store.json").exists():
        raise UserError(
            f"this machine does not see {folder}. With several machines the results go into a "
            f"folder that all of them share under one path."
        )
    # Leftovers are not cleared here: those of living processes on other machines look dead.
    return Store(folder, create=False)


def _require_same_version(driver_version: str) -> None:
    if driver_version != __version__:
        raise UserError(
            f"this machine has recallzoo {__version__}, the one that started the sweep "
            f"{driver_version}. Install the same version everywhere."
        )
