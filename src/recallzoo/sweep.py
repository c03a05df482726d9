"""From a list of runs to a store full of results.

Runs that are finished are skipped. The others are sorted into packs of equal shape, and each
pack is written down before it trains, so that a sweep that was killed goes on with the same
packs from their last checkpoints and ends with the same table as one left alone.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from recallzoo.devices import SLOW_BFLOAT16, choose_device, emulates_bfloat16
from recallzoo.errors import InvalidConfig, UserError
from recallzoo.executors._contract import Executor, Watcher
from recallzoo.executors._record import recorded
from recallzoo.executors.devices import runs_that_fit
from recallzoo.executors.local import LocalExecutor
from recallzoo.files import LOCK_FILE, exclusive, write_json
from recallzoo.preflight import check_runs
from recallzoo.random import seed_of
from recallzoo.run import Run
from recallzoo.store import Result, Store
from recallzoo.train.packed import checkpoint_members

MOST_PACKS_PER_DEVICE = 64


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How a sweep is carried out; none of these changes a result beyond rounding."""

    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N; with Ray auto, cpu or cuda."""
    max_pack_size: int | None = None
    """Most runs in a pack; None takes what is expected to fit into memory."""
    compiled: bool | None = None
    """Whether the training step is compiled; None compiles on CUDA."""
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
    seconds: float | None = None
    """Time after which no pack is begun, and those in training stop at a checkpoint."""

    def __post_init__(self) -> None:
        if self.executor not in ("local", "ray"):
            raise InvalidConfig(f"executor={self.executor!r} must be 'local' or 'ray'.")
        for name, default in (("ray_address", None), ("devices", None), ("packs_per_device", 1)):
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
class _Plan:
    """The packs still to train, each with the name of its folder."""

    packs: list[tuple[str, list[Run]]] = field(default_factory=list)


def sweep(
    runs: list[Run], store: Store, watcher: Watcher, options: SweepOptions | None = None
) -> list[Result]:
    """Train every run that `store` does not hold yet; return the results of all of them, or,
    where `options.seconds` did not suffice, of those that are finished.

    Raises what `check_runs` does before anything trains, UserError if another process is writing
    to the store.
    """
    started = time.monotonic()
    options = options or SweepOptions()
    check_runs(runs)
    busy = f"another process is writing to {store.folder}. Wait for it, or use another folder."
    with (
        _executor(options, started) as executor,
        exclusive(store.folder / LOCK_FILE, busy),
        _recorded(runs, store, executor, options) as record,
    ):
        store.clear_leftovers()
        store.plan({run.hash: _in_words(run) for run in runs})
        plan = _make_plan(runs, store, executor, options.max_pack_size)
        num_finished = sum(store.has(run.hash) for run in runs)
        record["num_packs"] = len(plan.packs)
        watcher.sweep_started(len(runs), num_finished, len(plan.packs))
        for message in [*_split_groups(plan.packs), *_slow_products(plan.packs, executor)]:
            watcher.warned(message)
        executor.train(
            plan.packs,
            store,
            watcher,
            lambda name, pack: _halve(name, pack, store, watcher, options.packs_per_device),
        )
        store.clear_leftovers()  # of workers that were lost meanwhile
        finished = [run.hash for run in runs if store.has(run.hash)]
        if len(finished) < len(runs):
            record["outcome"] = "out of time"
        if finished:
            store.write_table()
    return [store.read(run_hash) for run_hash in finished]


def _in_words(run: Run) -> dict[str, Any]:
    """What a run is, for those who read a folder in which it is not finished."""
    tasks = dict.fromkeys(segment.task for segment in run.data.test)
    lengths, pairs = (
        ", ".join(dict.fromkeys(str(getattr(task, name, None)) for task in tasks))
        for name in ("seq_len", "num_pairs")
    )
    names = ", ".join(dict.fromkeys(task.name for task in tasks))
    sizes = f"{names}, {lengths} tokens" + f", {pairs} pairs" * (pairs != "None")
    return {
        "cell": f"{run.model_label}, {run.model.num_layers} layers, width {run.model.d_model}, "
        f"{run.precision}; {sizes}",
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
        compiled=options.compiled,
        checkpoint_seconds=options.checkpoint_seconds,
        deadline=deadline,
    )
    with ray_executor(ray_options) as executor:
        yield executor


def _halve(
    name: str, members: list[Run], store: Store, watcher: Watcher, packs_per_device: int
) -> list[tuple[str, list[Run]]]:
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


def _make_plan(
    runs: list[Run], store: Store, executor: Executor, max_pack_size: int | None
) -> _Plan:
    by_hash = {run.hash: run for run in runs}
    waiting = {h: run for h, run in by_hash.items() if not store.has(h)}
    plan = _Plan()
    for folder in (store.folder / "packs").glob("[!.]*/"):
        if not (folder / "pack.json").exists():  # killed while it was being removed
            shutil.rmtree(folder, ignore_errors=True)
    for name, members in store.packs().items():
        if not all(h in by_hash for h in members):
            continue
        # A run that had left the pack, and whose result was deleted since, is in no checkpoint.
        kept = checkpoint_members(store.folder / "packs" / name / "checkpoint.safetensors")
        going_on = [h for h in members if h in waiting and (kept is None or h in kept)]
        if going_on:
            plan.packs.append((name, [by_hash[h] for h in members]))
            for h in going_on:
                waiting.pop(h)
        else:
            shutil.rmtree(store.folder / "packs" / name, ignore_errors=True)
    for members in _packs(list(waiting.values()), executor.runs_that_fit, max_pack_size):
        plan.packs.append(_record_pack(members, store))
    return plan


def packs_of(runs: list[Run], device: torch.device, max_pack_size: int | None) -> list[list[Run]]:
    """Runs sorted into packs of equal shape, of a size that is expected to fit into memory."""
    return _packs(runs, lambda run: runs_that_fit(run, device), max_pack_size)


def _packs(
    runs: list[Run], fit: Callable[[Run], int], max_pack_size: int | None
) -> list[list[Run]]:
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


def _split_groups(packs: list[tuple[str, list[Run]]]) -> list[str]:
    """What to say of groups that were to stop together and are in several packs."""
    places: dict[str, set[int]] = {}
    for number, (_, members) in enumerate(packs):
        for run in members:
            if run.budget.stop_group:
                places.setdefault(run.group_key, set()).add(number)
    split = sum(len(numbers) > 1 for numbers in places.values())
    return [f"{split} groups do not fit into one pack: their parts stop apart."] if split else []


def _slow_products(packs: list[tuple[str, list[Run]]], executor: Executor) -> list[str]:
    """What to say before products are emulated here; that they were is in each result, wherever."""
    is_asked = any(run.precision == "bf16" for _, members in packs for run in members)
    is_here = isinstance(executor, LocalExecutor)
    if is_asked and is_here and emulates_bfloat16(torch.device(executor.device)):
        return [SLOW_BFLOAT16]
    return []


def _record_pack(members: list[Run], store: Store) -> tuple[str, list[Run]]:
    hashes = [run.hash for run in members]
    name = f"{seed_of(*hashes):016x}"
    write_json(store.folder / "packs" / name / "pack.json", hashes)
    return name, members
