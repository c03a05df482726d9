"""Packs on the devices of a Ray cluster.

Each pack is a Ray task on one GPU, or on one CPU where the cluster has no GPU or none is wanted.
The task writes finished runs and checkpoints into the results folder itself, which all machines
share; the driver hands out packs, watches, and writes nothing but the plan. So whatever is lost,
a task, a machine or the driver, what was finished is on disk, and a pack goes on elsewhere from
its last checkpoint. A pack that loses its worker several times without getting further is given
up with a message, as it would take down one worker after another.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from recallzoo._version import __version__
from recallzoo.cluster import connected
from recallzoo.errors import StoreError, UserError
from recallzoo.executors._contract import Halve, NamedPack, Watcher
from recallzoo.executors._worker import Outcome, fit_on_worker, train_on_worker
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
    most: int | None
    """Packs that train at once; None: as many as there are devices."""
    compiled: bool | None
    checkpoint_seconds: float


class RayExecutor:
    """A connected cluster. Made by `ray_executor`."""

    def __init__(self, ray: Any, options: RayOptions) -> None:
        self._ray = ray
        self._options = options
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        if options.device == "cuda" and not num_gpus:
            raise UserError(
                "device 'cuda' was asked for, but the Ray cluster has no GPU. Use --device cpu, or "
                "add machines with GPUs to the cluster."
            )
        self.device = "cuda" if num_gpus and options.device != "cpu" else "cpu"
        self._needs = {"num_cpus": 1, "num_gpus": int(self.device == "cuda")}
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()

    def runs_that_fit(self, run: Run) -> int:
        remote = self._ray.remote(fit_on_worker).options(**self._needs)
        return self._ray.get(remote.remote(run, self.device))

    def train(self, packs: list[NamedPack], store: Store, watcher: Watcher, halve: Halve) -> None:
        waiting, training = list(packs), dict[Any, _Training]()
        losses = _Losses(store)
        number, last_sign = 0, time.monotonic()
        try:
            while waiting or training:
                while waiting and len(training) < self._num_devices():
                    name, runs = waiting.pop(0)
                    reference = self._submit(name, runs, store)
                    lane = watcher.beside() if isinstance(watcher, ManyPacksWatcher) else watcher
                    done = {run.hash for run in runs if store.has(run.hash)}
                    training[reference] = _Training(name, runs, lane, reported=done)
                ended, _ = self._ray.wait(list(training), timeout=POLL_SECONDS)
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
                    waiting = self._follow_up(reference, pack, halve, losses, watcher) + waiting
        finally:
            for reference, pack in training.items():
                self._ray.cancel(reference, force=True)
                if pack.started:
                    pack.watcher.pack_ended()

    def _num_devices(self) -> int:
        kind = "GPU" if self.device == "cuda" else "CPU"
        available = int(self._ray.cluster_resources().get(kind, 0))
        return max(
            1, available if self._options.most is None else min(self._options.most, available)
        )

    def _submit(self, name: str, runs: list[Run], store: Store) -> Any:
        # A lost task is handed out again here rather than by Ray, so that it is told of.
        remote = self._ray.remote(train_on_worker).options(**self._needs, max_retries=0)
        return remote.remote(
            runs,
            str(store.folder.resolve()),
            name,
            self.device,
            self._options.compiled,
            self._options.checkpoint_seconds,
            self._mailbox,
            __version__,
        )

    def _follow_up(
        self,
        reference: Any,
        pack: _Training,
        halve: Halve,
        losses: "_Losses",
        watcher: Watcher,
    ) -> list[NamedPack]:
        """What is to be trained in place of a pack that ended."""
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except errors.OutOfMemoryError:
            outcome = Outcome("out of memory")
        except errors.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except errors.RayError as error:
            reason = str(error).strip().partition("\n")[0]
            losses.add(pack, reason)
            watcher.warned(
                f"a worker was lost while it trained {pack.runs[0].model_label} "
                f"({len(pack.runs)} runs); the pack goes on from its last checkpoint. {reason}"
            )
            return [(pack.name, pack.runs)]
        if outcome.what == "out of memory":
            return halve(pack.name, pack.runs)
        if outcome.what == "failed":
            raise (UserError if outcome.exit_code == 2 else StoreError)(outcome.message)
        return []


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

    def __init__(self, store: Store) -> None:
        self._store = store
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
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device {options.device!r} names one device of this machine; Ray chooses devices "
            f"itself. Use --device auto, cpu or cuda."
        )
    cpus = options.most if options.device == "cpu" else None
    with connected(options.address, cpus, ", or use --executor local on this machine") as ray:
        yield RayExecutor(ray, options)
