"""From a list of runs to a store full of results.

Runs that are finished are skipped. The others are sorted into packs of equal shape, and each
pack is written down before it trains, so that a sweep that was killed goes on with the same
packs from their last checkpoints and ends with the same table as one left alone.
"""

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from recallzoo.cells import cell_words
from recallzoo.devices import SLOW_BFLOAT16, choose_device, emulates_bfloat16
from recallzoo.errors import InvalidConfig, StoreError, UserError
from recallzoo.executors._contract import Executor, NamedPack, Unwatched, Watcher
from recallzoo.executors._record import recorded
from recallzoo.executors.local import LocalExecutor
from recallzoo.files import LOCK_FILE, exclusive, write_json
from recallzoo.preflight import check_runs
from recallzoo.random import seed_of
from recallzoo.run import Run
from recallzoo.store import Result, Store
from recallzoo.train._compiling import whether_to_compile
from recallzoo.train.packed import checkpoint_members

MOST_PACKS_PER_DEVICE = 64
_OF_RAY = {"ray_address": None, "devices": None, "packs_per_device": 1, "device_sharing": "auto"}
"""Options that a sweep in one process would ignore, and their defaults."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How a sweep is carried out; none of these changes a result beyond rounding."""

    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N; with Ray auto, cpu or cuda."""
    max_pack_size: int | None = None
    """Most runs in a pack; None takes what is expected to fit into memory."""
    compiled: bool | None = None
    """Whether the training step is compiled; None compiles on CUDA, where that is expected to
    pay."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints of a pack."""
    executor: Literal["local", "ray"] = "local"
    """This process, or the devices of a Ray cluster."""
    ray_address: str | None = None
    """host:port of the cluster, or auto; None: RAY_ADDRESS, or this machine alone."""
    devices: int | None = None
    """Most devices of the cluster to use at once; None uses all."""
    packs_per_device: int = 1
    """Packs that share a device of the cluster: one trains while another compiles."""
    device_sharing: Literal["auto", "mps", "turns"] = "auto"
    """How these packs share a GPU: at once, through NVIDIA's Multi-Process Service, or in turns.
    auto: at once, where the service starts and the cluster is made for the sweep."""
    seconds: float | None = None
    """Time after which no pack is begun, and those in training stop at a checkpoint."""

    def __post_init__(self) -> None:
        if self.executor not in ("local", "ray"):
            raise InvalidConfig(f"executor={self.executor!r} must be 'local' or 'ray'.")
        for name, default in _OF_RAY.items():
            if self.executor != "ray" and getattr(self, name) != default:
                raise InvalidConfig(
                    f"{name}={getattr(self, name)!r} would be ignored by this process. Choose the "
                    f"executor 'ray', or leave it out."
                )
        if self.devices is not None and self.devices < 1:
            raise InvalidConfig(f"devices={self.devices} must be at least 1.")
        if not 1 <= self.packs_per_device <= MOST_PACKS_PER_DEVICE:
            raise InvalidConfig(
                f"packs_per_device={self.packs_per_device} must be from 1 to "
                f"{MOST_PACKS_PER_DEVICE}."
            )
        if self.device_sharing not in ("auto", "mps", "turns"):
            raise InvalidConfig(
                f"device_sharing={self.device_sharing!r} must be 'auto', 'mps' or 'turns'."
            )
        shares = self.packs_per_device > 1 and self.device != "cpu"
        if self.device_sharing != "auto" and not shares:
            raise InvalidConfig(
                f"device_sharing={self.device_sharing!r} would be ignored: it is for several packs "
                f"on one GPU. Set packs_per_device, or leave it out."
            )
        if self.max_pack_size is not None and self.max_pack_size < 1:
            raise InvalidConfig(f"max_pack_size={self.max_pack_size} must be at least 1.")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise InvalidConfig(f"seconds={self.seconds} must be a finite time above 0.")
        if self.executor == "local":
            choose_device(self.device)
        elif self.device not in ("auto", "cpu", "cuda"):
            raise InvalidConfig(
                f"device {self.device!r} names one device of this machine; Ray chooses devices "
                f"itself. Use --device auto, cpu or cuda."
            )


@dataclass
class Plan:
    """The packs still to train."""

    recorded: list[NamedPack] = field(default_factory=list)
    """Of earlier calls, which go on."""
    new: list[list[Run]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Names of recorded packs with nothing to go on with, or that are planned anew."""
    known: set[str] = field(default_factory=set)
    """Hashes of runs that train though their results are known, as their packs have begun."""
    notes: list[str] = field(default_factory=list)
    """What to say of it."""


def sweep(
    runs: list[Run],
    store: Store,
    watcher: Watcher | None = None,
    options: SweepOptions | None = None,
    known: Collection[str] = (),
) -> list[Result]:
    """Train every run that `store` does not hold yet; return the results of all of them, or,
    where `options.seconds` did not suffice, of those that are finished. `watcher` is told of
    progress and warnings; without one, warnings are Python's.

    `known` are hashes of runs whose results are elsewhere: they are not trained, and not asked for
    in the store's records, unless they are in a pack that has begun.

    Raises what `check_runs` does before anything trains, UserError if another process is writing
    to the store, StoreError if it was deleted meanwhile.
    """
    started = time.monotonic()
    options, watcher = options or SweepOptions(), watcher or Unwatched()
    check_runs(runs)
    busy = f"another process is writing to {store.folder}. Wait for it, or use another folder."
    with (
        _executor(options, started) as executor,
        exclusive(store.folder / LOCK_FILE, busy),
        _recorded(runs, store, executor, options) as record,
    ):
        store.clear_leftovers()
        plan = make_plan(runs, store, executor.runs_that_fit, options.max_pack_size, known)
        asked = [run for run in runs if run.hash not in known or run.hash in plan.known]
        store.plan({run.hash: _in_words(run) for run in asked})
        packs = _record_plan(plan, store)
        num_finished = sum(store.has(run.hash) for run in asked)
        record["num_runs"], record["num_packs"] = len(asked), len(packs)
        watcher.sweep_started(len(asked), num_finished, len(packs))
        messages = [*_slow_products(packs, executor), *_not_compiled(packs, executor, options)]
        for message in [*plan.notes, *messages]:
            watcher.warned(message)
        executor.train(
            packs,
            store,
            watcher,
            lambda name, pack: _halve(name, pack, store, watcher, options.packs_per_device),
        )
        store.clear_leftovers()  # of workers that were lost meanwhile
        finished = [run.hash for run in runs if store.has(run.hash)]
        is_complete = all(store.has(run.hash) for run in asked)
        if not (store.folder / LOCK_FILE).exists() or not (is_complete or options.seconds):
            store.mark()
            raise StoreError(
                f"{store.folder} was deleted or moved, in whole or in part, while its runs "
                f"trained. Run the same command again: what finished since is kept there, and what "
                f"is missing is trained anew."
            )
        if not is_complete:
            record["outcome"] = "out of time"
        if finished:
            store.write_table()
    return [store.read(run_hash) for run_hash in finished]


def _in_words(run: Run) -> dict[str, Any]:
    """What a run is, for those who read a folder in which it is not finished."""
    return {
        "cell": cell_words(run.model_label, run.config),
        "learning_rate": run.optimizer.learning_rate,
        "seed": run.seed,
    }


@contextmanager
def _recorded(
    runs: list[Run], store: Store, executor: Executor, options: SweepOptions
) -> Iterator[dict[str, Any]]:
    """The entry of this call in `sweep.json`."""

    def num_finished() -> int:
        return sum(store.has(run.hash) for run in runs)

    before = num_finished()
    with recorded(
        store.folder,
        executor=options.executor,
        device=executor.device,
        num_devices=executor.num_devices,
        packs_per_device=options.packs_per_device,
        device_sharing=executor.sharing,
        max_pack_size=options.max_pack_size,
        num_runs=len(runs),
        num_runs_trained=0,
        num_packs=None,
    ) as entry:
        try:
            yield entry
        finally:
            entry["num_runs_trained"] = num_finished() - before


@contextmanager
def _executor(options: SweepOptions, started: float) -> Iterator[Executor]:
    deadline = None if options.seconds is None else started + options.seconds
    if options.executor == "local":
        yield LocalExecutor(options.device, options.compiled, options.checkpoint_seconds, deadline)
        return
    from recallzoo.executors.on_ray import RayOptions, ray_executor

    ray_options = RayOptions(
        address=options.ray_address,
        device=options.device,
        most_devices=options.devices,
        packs_per_device=options.packs_per_device,
        sharing=options.device_sharing,
        compiled=options.compiled,
        checkpoint_seconds=options.checkpoint_seconds,
        deadline=deadline,
    )
    with ray_executor(ray_options) as executor:
        yield executor


def _halve(
    name: str, members: list[Run], store: Store, watcher: Watcher, packs_per_device: int
) -> list[NamedPack]:
    """Smaller packs in place of one that did not fit into memory, without its finished runs."""
    members = [run for run in members if not store.has(run.hash)]
    if len(members) == 1:
        share = f"1/{packs_per_device} of " if packs_per_device > 1 else ""
        raise UserError(
            f"run {members[0].hash} ({members[0].model_label}) does not fit into {share}the "
            f"device's memory even alone. Lower budget.batch_size or the model's size"
            f"{', or --packs-per-device' if share else ''}."
        )
    parts = _cut(members, (len(members) + 1) // 2)
    watcher.warned(
        f"out of memory with {len(members)} runs in a pack; going on with {len(parts[0])}."
    )
    shutil.rmtree(store.folder / "packs" / name, ignore_errors=True)
    return [_record_pack(part, store) for part in parts]


def make_plan(
    runs: list[Run],
    store: Store | None,
    fit: Callable[[Run], int],
    max_pack_size: int | None,
    known: Collection[str] = (),
) -> Plan:
    """The packs that a sweep trains into `store`, which is left as it is; None: an empty one.

    Recorded packs go on as they are, so that a sweep that was killed ends with the same table. One
    that is larger than `max_pack_size`, or has runs that are `known` by now, is planned anew unless
    what it has trained would be lost.
    """
    by_hash = {run.hash: run for run in runs}
    waiting = {
        h: run
        for h, run in by_hash.items()
        if h not in known and (store is None or not store.has(h))
    }
    plan = Plan()
    if store is not None:
        _plan_recorded(plan, store, by_hash, waiting, max_pack_size, known)
    plan.new = _packs(list(waiting.values()), fit, max_pack_size)
    plan.notes += _split_groups([*(members for _, members in plan.recorded), *plan.new])
    return plan


def _plan_recorded(
    plan: Plan,
    store: Store,
    by_hash: dict[str, Run],
    waiting: dict[str, Run],
    max_pack_size: int | None,
    known: Collection[str],
) -> None:
    """Sort the store's packs into `plan`; the runs of those that go on are taken from `waiting`."""
    too_large = []
    for name, members in store.packs().items():
        if not all(h in by_hash for h in members):
            continue
        checkpoint = store.folder / "packs" / name / "checkpoint.safetensors"
        # A run that had left the pack, and whose result was deleted since, is in no checkpoint.
        kept = checkpoint_members(checkpoint)
        going_on = [h for h in members if h in waiting and (kept is None or h in kept)]
        has_begun = checkpoint.exists() or any(store.has(h) for h in members)
        is_too_large = max_pack_size is not None and len(members) > max_pack_size
        known_here = {
            h for h in members if h in known and not store.has(h) and (kept is None or h in kept)
        }
        loses_nothing = (is_too_large and not has_begun) or (
            bool(known_here) and not checkpoint.exists()
        )
        if not going_on or loses_nothing:
            plan.dropped.append(name)
            continue
        plan.recorded.append((name, [by_hash[h] for h in members]))
        for h in going_on:
            waiting.pop(h)
        if is_too_large:
            too_large.append(str(store.folder / "packs" / name))
        plan.known |= known_here
    if plan.known:
        plan.notes.append(
            f"{len(plan.known)} runs whose results are known go on all the same: their packs have "
            f"a checkpoint, and what the other runs in it have trained would be lost."
        )
    if too_large:
        plan.notes.append(_kept_though_too_large(too_large, max_pack_size))


def _kept_though_too_large(folders: list[str], max_pack_size: int | None) -> str:
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    return (
        f"packs with more than {max_pack_size} runs (--max-pack-size) that have begun go on as "
        f"they are: {', '.join(folders[:3])}{more}. To train their runs from the start in smaller "
        f"packs, delete these folders and run the same command again."
    )


def _record_plan(plan: Plan, store: Store) -> list[NamedPack]:
    """Carry out a plan's changes to the store; returns all of its packs."""
    for folder in (store.folder / "packs").glob("[!.]*/"):
        # One without a record was killed while it was being removed.
        if folder.name in plan.dropped or not (folder / "pack.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return [*plan.recorded, *(_record_pack(members, store) for members in plan.new)]


def _packs(
    runs: list[Run], fit: Callable[[Run], int], max_pack_size: int | None
) -> list[list[Run]]:
    """Runs sorted into packs of equal shape, of a size that is expected to fit into memory."""
    by_shape: dict[str, list[Run]] = {}
    for run in runs:
        by_shape.setdefault(run.pack_key, []).append(run)
    return [
        pack
        for members in by_shape.values()
        for pack in _cut(members, max_pack_size or fit(members[0]))
    ]


def _cut(members: list[Run], size: int) -> list[list[Run]]:
    """Packs of at most `size` runs. Runs that stop as a group stay together unless they are more
    than that."""
    groups: dict[str, list[Run]] = {}
    for run in members:
        key = run.group_key if run.budget.stop_group else run.hash
        groups.setdefault(key, []).append(run)
    packs: list[list[Run]] = [[]]
    for group in groups.values():
        if packs[-1] and len(packs[-1]) + len(group) > size:
            packs.append([])
        for run in group:
            if len(packs[-1]) == size:
                packs.append([])
            packs[-1].append(run)
    return packs


def _split_groups(packs: list[list[Run]]) -> list[str]:
    """What to say of groups that were to stop together and are in several packs."""
    places: dict[str, set[int]] = {}
    for number, members in enumerate(packs):
        for run in members:
            if run.budget.stop_group:
                places.setdefault(run.group_key, set()).add(number)
    split = sum(len(numbers) > 1 for numbers in places.values())
    return [f"{split} groups do not fit into one pack: their parts stop apart."] if split else []


def _slow_products(packs: list[NamedPack], executor: Executor) -> list[str]:
    """What to say before products are emulated here; that they were is in each result, wherever."""
    is_asked = any(run.precision == "bf16" for _, members in packs for run in members)
    is_here = isinstance(executor, LocalExecutor)
    if is_asked and is_here and emulates_bfloat16(torch.device(executor.device)):
        return [SLOW_BFLOAT16]
    return []


def _not_compiled(packs: list[NamedPack], executor: Executor, options: SweepOptions) -> list[str]:
    """What to say where compiling is left out as it would not pay; each result has it too."""
    device = torch.device(executor.device)
    reasons = [whether_to_compile(options.compiled, device, members)[1] for _, members in packs]
    return [
        f"{number} of {len(packs)} packs are not compiled: {reason}. --compile step does it."
        for reason, number in Counter(filter(None, reasons)).items()
    ]


def _record_pack(members: list[Run], store: Store) -> NamedPack:
    hashes = [run.hash for run in members]
    name = f"{seed_of(*hashes):016x}"
    write_json(store.folder / "packs" / name / "pack.json", hashes)
    return name, members
