"""Packs on the devices of a Ray cluster.

Each pack trains on one GPU or a share of it, or on CPUs where the cluster has no GPU or none is
wanted. Its worker writes finished runs and checkpoints into the results folder itself, which all
machines share; the driver hands out packs, watches, and writes nothing but the plan. So whatever
is lost, a worker, a machine or the driver, what was finished is on disk, and a pack goes on
elsewhere from its last checkpoint. A pack that loses its worker several times without getting
further is given up with a message, as it would take down one worker after another.
"""

import functools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from recallzoo._version import __version__
from recallzoo.cluster import connected, is_connected
from recallzoo.errors import StoreError, UserError
from recallzoo.executors import _mps
from recallzoo.executors._contract import Halve, NamedPack, Watcher
from recallzoo.executors._lanes import Lanes, Seat
from recallzoo.executors._worker import Outcome, PackWorker, WorkerOptions, memory_on_worker
from recallzoo.executors.devices import expected_cost, runs_that_fit
from recallzoo.mixers._user_file import files_of
from recallzoo.run import Run
from recallzoo.store import Store
from recallzoo.train.packed import Progress

POLL_SECONDS = 0.3
WAITING_SECONDS = 60.0
"""Time without any pack in training after which the user is told."""
MOST_LOSSES = 3
"""Losses of a pack's worker, one after another without a result or checkpoint in between."""


@runtime_checkable
class ManyPacksWatcher(Protocol):
    """A watcher that can follow several packs at once, each through one of its own."""

    def beside(self) -> Watcher: ...


@dataclass
class _Training:
    """A pack that was handed out."""

    name: str
    runs: list[Run]
    watcher: Watcher
    seat: Seat
    started: bool = False
    reported: set[str] = field(default_factory=set)
    """Runs whose results were told of, or were there before."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Which cluster, and how it is used."""

    address: str | None
    """host:port, or auto; None: RAY_ADDRESS, or this machine alone."""
    device: str
    """auto (GPUs if the cluster has any), cpu or cuda."""
    most_devices: int | None
    """Devices to use at once; None: all."""
    packs_per_device: int
    sharing: Literal["auto", "mps", "turns"]
    """How these packs share a GPU; auto: through NVIDIA's Multi-Process Service, where the cluster
    is made here and the service starts, else in turns."""
    compiled: bool | None
    checkpoint_seconds: float
    deadline: float | None = None
    """Value of `time.monotonic()` after which no pack is begun; None never."""


class RayExecutor:
    """A connected cluster. Made by `ray_executor`."""

    def __init__(
        self,
        ray: Any,
        options: RayOptions,
        sharing: Literal["mps", "turns"] | None,
        notes: tuple[str, ...],
    ) -> None:
        self._ray = ray
        self._options = options
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        if options.device == "cuda" and not num_gpus:
            raise UserError(
                "device 'cuda' was asked for, but the Ray cluster has no GPU. Use --device cpu, or "
                "add machines with GPUs to the cluster."
            )
        self.device: Literal["cpu", "cuda"] = (
            "cuda" if num_gpus and options.device != "cpu" else "cpu"
        )
        if options.sharing == "mps" and self.device == "cpu":
            raise UserError(
                "--device-sharing mps is for packs on a GPU, and this machine has none that Ray "
                "sees. Leave the option out to train on its CPUs."
            )
        self._resource = "GPU" if self.device == "cuda" else "CPU"
        self.sharing: Literal["mps", "turns"] | None = sharing if self.device == "cuda" else None
        self._notes = notes if self.device == "cuda" else ()
        # Beside the driver: lost with another machine, it would take the sweep along.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()

    @property
    def num_devices(self) -> int:
        available = int(self._ray.cluster_resources().get(self._resource, 0))
        return max(1, min(available, self._options.most_devices or available))

    @functools.cached_property
    def _memory_bytes(self) -> float:
        """A pack's share of a device's memory, asked of one device."""
        needs = {"num_cpus": 1, "num_gpus": int(self.device == "cuda")}
        remote = self._ray.remote(**needs)(memory_on_worker)
        try:
            memory_bytes = self._ray.get(remote.remote(self.device))
        except self._ray.exceptions.RayTaskError as error:
            raise _cannot_train(error) from None
        return memory_bytes / self._options.packs_per_device

    def runs_that_fit(self, run: Run) -> int:
        return runs_that_fit(run, torch.device(self.device), self._memory_bytes)

    def train(self, packs: list[NamedPack], store: Store, watcher: Watcher, halve: Halve) -> None:
        several = self.num_devices * self._options.packs_per_device > 1
        waiting = longest_first(packs) if several else list(packs)
        training, lanes = dict[Any, _Training](), self._lanes(store, packs)
        losses = _Losses(store, share_a_gpu=self.sharing == "mps")
        number, last_sign, has_time = 0, time.monotonic(), True
        for note in self._notes:
            watcher.warned(note)
        try:
            while waiting or training:
                left = self._seconds_left()
                if not has_time or (left is not None and left <= 0):
                    waiting = []  # they are written down: the next sweep goes on with them
                if waiting:
                    lanes.ask_for(min(self.num_devices, len(waiting) + len(training)))
                while waiting and (seat := lanes.take(expected_cost(waiting[0][1]))):
                    name, runs = waiting.pop(0)
                    lane = watcher.beside() if isinstance(watcher, ManyPacksWatcher) else watcher
                    done = {run.hash for run in runs if store.has(run.hash)}
                    ends_at = None if left is None else time.time() + left
                    reference = seat.worker.train.remote(name, runs, ends_at)
                    training[reference] = _Training(name, runs, lane, seat, reported=done)
                ended = self._ended(list(training))
                for name, progress in self._ray.get(self._mailbox.take.remote()).items():
                    pack = next((p for p in training.values() if p.name == name), None)
                    if pack is None:
                        continue
                    if not pack.started:
                        number += 1
                        total = (
                            number + len(waiting) + sum(not p.started for p in training.values())
                        )
                        pack.watcher.pack_started(pack.runs, number, total - 1)
                        pack.started = True
                    if progress is not None:
                        pack.watcher.pack_progressed(progress)
                for pack in training.values():
                    _tell_results(pack, store, watcher)
                if any(pack.started for pack in training.values()) or ended:
                    last_sign = time.monotonic()
                elif time.monotonic() - last_sign > WAITING_SECONDS:
                    watcher.warned(
                        f"no {self.device} device of the Ray cluster has taken a pack for "
                        f"{WAITING_SECONDS:.0f} s; waiting."
                    )
                    last_sign = time.monotonic()
                for reference in ended:
                    pack = training.pop(reference)
                    _tell_results(pack, store, watcher)
                    if pack.started:
                        pack.watcher.pack_ended()
                    outcome, is_alive = self._outcome(reference)
                    has_time = has_time and outcome.what != "out of time"
                    lanes.give_back(pack.seat, is_alive=is_alive)
                    waiting = _follow_up(pack, outcome, halve, losses, watcher) + waiting
                if not waiting:
                    lanes.release()
        finally:
            lanes.release(busy=True)
            for pack in training.values():
                if pack.started:
                    pack.watcher.pack_ended()

    def _seconds_left(self) -> float | None:
        deadline = self._options.deadline
        return None if deadline is None else deadline - time.monotonic()

    def _lanes(self, store: Store, packs: list[NamedPack]) -> Lanes:
        tasks = {type(s.task) for _, runs in packs for r in runs for s in r.data.segments}
        options = WorkerOptions(
            folder=str(store.folder.resolve()),
            device=self.device,
            compiled=self._options.compiled,
            checkpoint_seconds=self._options.checkpoint_seconds,
            packs_per_device=self._options.packs_per_device,
            most_devices=self._options.most_devices,
            version=__version__,
            files=files_of(tasks),
        )
        # A lost pack is handed out again here rather than by Ray, so that it is told of.
        worker = self._ray.remote(max_restarts=0, max_task_retries=0)(PackWorker)
        return Lanes(
            self._ray,
            self._resource,
            self._options.packs_per_device,
            lambda needs: worker.options(**needs).remote(options, self._mailbox),
        )

    def _ended(self, references: list[Any]) -> list[Any]:
        """Those that ended, after a moment for some to end."""
        if not references:
            time.sleep(POLL_SECONDS)
            return []
        return self._ray.wait(references, timeout=POLL_SECONDS)[0]

    def _outcome(self, reference: Any) -> tuple[Outcome, bool]:
        """How a pack ended, and whether its worker is alive. Raises what the pack raised."""
        errors = self._ray.exceptions
        try:
            outcome = self._ray.get(reference)
            return outcome, outcome.what != "lost"
        except errors.OutOfMemoryError:  # the machine's: Ray ends a worker
            return Outcome("out of memory"), False
        except errors.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False) and not _mps.is_lost(error):
                raise _cannot_train(error) from None
            return Outcome("lost", _last_line(error)), False


def _follow_up(
    pack: _Training, outcome: Outcome, halve: Halve, losses: "_Losses", watcher: Watcher
) -> list[NamedPack]:
    """What is to be trained in place of a pack that ended."""
    if outcome.what == "out of memory":
        return halve(pack.name, pack.runs)
    if outcome.what == "failed":
        raise (UserError if outcome.exit_code == 2 else StoreError)(outcome.message)
    if outcome.what == "lost":
        losses.add(pack, outcome.message)
        watcher.warned(
            f"a worker was lost while it trained {pack.runs[0].model_label} "
            f"({len(pack.runs)} runs); the pack goes on from its last checkpoint. {outcome.message}"
        )
        return [(pack.name, pack.runs)]
    return []


def _last_line(error: Exception) -> str:
    """What Ray's errors, which hold a worker's traceback or log, come down to."""
    return str(error).strip().rpartition("\n")[2].partition(" Some common causes include")[0]


def _cannot_train(error: Exception) -> UserError:
    return UserError(
        f"a machine of the Ray cluster cannot train: {_last_line(error)}. All need the version of "
        f"recallzoo that is here ({__version__}), and a PyTorch that can use their devices."
    )


def longest_first(packs: list[NamedPack]) -> list[NamedPack]:
    """So that devices finish at about the same time: a long pack begun last would keep one of
    them busy alone (Graham 1969, Bounds on multiprocessing timing anomalies)."""
    return sorted(packs, key=lambda pack: expected_cost(pack[1]), reverse=True)


class _Mailbox:
    """The latest word of every pack. A Ray actor."""

    def __init__(self) -> None:
        self._latest: dict[str, Progress | None] = {}

    def put(self, name: str, progress: Progress | None) -> None:
        self._latest[name] = progress

    def take(self) -> dict[str, Progress | None]:
        latest, self._latest = self._latest, {}
        return latest


class _Losses:
    """How often each pack lost its worker without having got further."""

    def __init__(self, store: Store, *, share_a_gpu: bool) -> None:
        self._store = store
        self._together = (
            " Workers that share a GPU are lost together: --device-sharing turns tells which pack "
            "it is."
        ) * share_a_gpu
        self._counts: dict[str, tuple[tuple[int, int], int]] = {}

    def add(self, pack: _Training, reason: str) -> None:
        """Count one. StoreError for the last one that is borne."""
        done = sum(self._store.has(run.hash) for run in pack.runs)
        checkpoint = checkpoint_of(self._store.folder, pack.name)
        state = (done, checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0)
        before, count = self._counts.get(pack.name, (state, 0))
        count = count + 1 if before == state else 1
        self._counts[pack.name] = (state, count)
        if count >= MOST_LOSSES:
            raise StoreError(
                f"pack {pack.name} ({pack.runs[0].model_label}, {len(pack.runs)} runs) lost its "
                f"worker {count} times without a result or checkpoint in between; the last reason: "
                f"{reason} Finished runs are kept. Try --max-pack-size {len(pack.runs) // 2 or 1} "
                f"or a smaller --checkpoint-seconds, and look into the logs of the cluster."
                f"{self._together}"
            )


def checkpoint_of(folder: Path, name: str) -> Path:
    """Where a pack's checkpoint is in a results folder."""
    return folder / "packs" / name / "checkpoint.safetensors"


def _tell_results(pack: _Training, store: Store, watcher: Watcher) -> None:
    for run in pack.runs:
        if run.hash not in pack.reported and store.has(run.hash):
            pack.reported.add(run.hash)
            watcher.run_finished(store.read(run.hash))


@contextmanager
def ray_executor(options: RayOptions) -> Iterator[RayExecutor]:
    """Connect to a cluster, or make one of this machine, for as long as this lasts.

    Raises UserError without Ray, without an answer, or for a device that the cluster lacks.
    """
    cpus = options.most_devices if options.device == "cpu" else None
    instead = ", or use --executor local on this machine"
    with ExitStack() as stack:
        sharing, notes = _enter_sharing(stack, options)
        ray = stack.enter_context(connected(options.address, cpus, instead))
        yield RayExecutor(ray, options, sharing, notes)


def _enter_sharing(
    stack: ExitStack, options: RayOptions
) -> tuple[Literal["mps", "turns"] | None, tuple[str, ...]]:
    """How workers of the cluster that is made next share GPUs, and what to say of it. None where
    they do not, or whoever made the cluster decided."""
    if options.packs_per_device == 1 or options.device == "cpu":
        return None, ()
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local" or is_connected():
        if options.sharing == "auto":
            return None, ()
        raise UserError(
            f"--device-sharing {options.sharing} is for a cluster that the sweep makes. On one "
            f"that exists leave it out: packs share a GPU at once where {_mps.CONTROL} was started "
            "on its machine before `ray start`, and else take turns."
        )
    if options.sharing == "turns" and _mps.is_running():
        raise UserError(
            "--device-sharing turns: NVIDIA's Multi-Process Service runs here, and packs would use "
            f"it. End it (echo quit | {_mps.CONTROL}), or name an empty folder in {_mps.PIPES}."
        )
    if options.sharing == "turns" or (options.sharing == "auto" and not _mps.is_here()):
        return "turns", ()
    try:
        stack.enter_context(_mps.mps())
    except _mps.NoService as error:
        if options.sharing == "mps":
            raise UserError(
                f"--device-sharing mps: {error}. Leave the option out, and packs take turns."
            ) from error
        return "turns", (f"packs take turns on a GPU: {error}",)
    return "mps", ()
