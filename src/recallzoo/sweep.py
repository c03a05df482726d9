"""From a list of runs to a store full of results.

Runs that are finished are skipped. The others are sorted into packs of equal shape, and each
pack is written down before it trains, so that a sweep that was killed goes on with the same
packs from their last checkpoints and ends with the same table as one left alone.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from recallzoo.errors import InvalidConfig, StoreError, UserError
from recallzoo.files import explain_os_error, read_json, write_json
from recallzoo.random import seed_of
from recallzoo.run import Run
from recallzoo.store import Result, Store
from recallzoo.train.packed import Pack, PackOptions, Progress


class Watcher(Protocol):
    """Told what happens in a sweep, as it happens."""

    def sweep_started(self, num_runs: int, num_finished: int, num_packs: int) -> None: ...
    def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None: ...
    def pack_progressed(self, progress: Progress) -> None: ...
    def run_finished(self, result: Result) -> None: ...
    def pack_ended(self) -> None: ...
    def warned(self, message: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How a sweep is carried out; none of these changes a result beyond rounding."""

    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""
    max_pack_size: int | None = None
    """Most runs in a pack; None takes what is expected to fit into memory."""
    compiled: bool | None = None
    """Whether the training step is compiled; None compiles on CUDA."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints of a pack."""

    def __post_init__(self) -> None:
        if self.max_pack_size is not None and self.max_pack_size < 1:
            raise InvalidConfig(f"max_pack_size={self.max_pack_size} must be at least 1.")


@dataclass
class _Plan:
    """The packs still to train, each with the name of its folder."""

    packs: list[tuple[str, list[Run]]] = field(default_factory=list)


def choose_device(name: str) -> torch.device:
    """The device that a name stands for. UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown. Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices here. Use --device cpu, or run "
            f"`recallzoo doctor` to see why."
        )
    return device


def sweep(
    runs: list[Run], store: Store, watcher: Watcher, options: SweepOptions | None = None
) -> list[Result]:
    """Train every run that `store` does not hold yet; return the results of all of them.

    Raises InvalidConfig for an empty list or two identical runs, UserError if another process
    is writing to the store.
    """
    options = options or SweepOptions()
    refuse_duplicates(runs)
    device = choose_device(options.device)
    with _exclusive(store.folder):
        plan = _make_plan(runs, store, device, options.max_pack_size)
        num_finished = sum(store.has(run.hash) for run in runs)
        watcher.sweep_started(len(runs), num_finished, len(plan.packs))
        for message in _split_groups(plan.packs):
            watcher.warned(message)
        number, waiting = 0, list(plan.packs)
        while waiting:
            name, members = waiting.pop(0)
            number += 1
            watcher.pack_started(members, number, number + len(waiting))
            try:
                _train_pack(name, members, store, device, watcher, options)
            except torch.OutOfMemoryError:
                waiting = _halve(name, members, store, watcher) + waiting
            finally:
                watcher.pack_ended()
        store.write_table()
    return [store.read(run.hash) for run in runs]


def _train_pack(
    name: str,
    members: list[Run],
    store: Store,
    device: torch.device,
    watcher: Watcher,
    options: SweepOptions,
) -> None:
    folder = store.folder / "packs" / name
    pack = Pack(
        members,
        device,
        PackOptions(
            compiled=options.compiled,
            checkpoint=folder / "checkpoint.safetensors",
            checkpoint_seconds=options.checkpoint_seconds,
            on_progress=watcher.pack_progressed,
        ),
    )
    for result in pack.train():
        if not store.has(result.hash):
            store.write(result)
            watcher.run_finished(result)
    shutil.rmtree(folder, ignore_errors=True)


def _halve(
    name: str, members: list[Run], store: Store, watcher: Watcher
) -> list[tuple[str, list[Run]]]:
    """Smaller packs in place of one that did not fit into memory, without its finished runs."""
    members = [run for run in members if not store.has(run.hash)]
    if len(members) == 1:
        raise UserError(
            f"run {members[0].hash} ({members[0].model_label}) does not fit into the device's "
            f"memory even alone. Lower budget.batch_size or the model's size."
        )
    torch.cuda.empty_cache()
    parts = _cut(members, (len(members) + 1) // 2)
    watcher.warned(
        f"out of memory with {len(members)} runs in a pack; going on with {len(parts[0])}."
    )
    shutil.rmtree(store.folder / "packs" / name, ignore_errors=True)
    return [_record_pack(part, store) for part in parts]


def _make_plan(
    runs: list[Run], store: Store, device: torch.device, max_pack_size: int | None
) -> _Plan:
    by_hash = {run.hash: run for run in runs}
    waiting = {h: run for h, run in by_hash.items() if not store.has(h)}
    plan = _Plan()
    for folder in (store.folder / "packs").glob("[!.]*/"):
        if not (folder / "pack.json").exists():  # killed while it was being removed
            shutil.rmtree(folder, ignore_errors=True)
    for record in sorted((store.folder / "packs").glob("[!.]*/pack.json")):
        members = read_json(record)
        if not (isinstance(members, list) and all(isinstance(h, str) for h in members)):
            raise StoreError(f"{record} is damaged. Delete {record.parent} and run again.")
        if not all(h in by_hash for h in members):
            continue
        if any(h in waiting for h in members):
            plan.packs.append((record.parent.name, [by_hash[h] for h in members]))
            for h in members:
                waiting.pop(h, None)
        else:
            shutil.rmtree(record.parent, ignore_errors=True)
    for members in packs_of(list(waiting.values()), device, max_pack_size):
        plan.packs.append(_record_pack(members, store))
    return plan


def packs_of(runs: list[Run], device: torch.device, max_pack_size: int | None) -> list[list[Run]]:
    """Runs sorted into packs of equal shape, of a size that is expected to fit into memory."""
    by_shape: dict[str, list[Run]] = {}
    for run in runs:
        by_shape.setdefault(run.pack_key, []).append(run)
    return [
        pack
        for members in by_shape.values()
        for pack in _cut(members, max_pack_size or runs_that_fit(members[0], device))
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


def _record_pack(members: list[Run], store: Store) -> tuple[str, list[Run]]:
    hashes = [run.hash for run in members]
    name = f"{seed_of(*hashes):016x}"
    write_json(store.folder / "packs" / name / "pack.json", hashes)
    return name, members


def runs_that_fit(run: Run, device: torch.device) -> int:
    """How many runs like this one are expected to train at once in the device's memory.

    Counts weights, gradients and moments, the logits with their gradient, and about twelve
    activations of width D a layer. An estimate: the sweep halves a pack that proves too large.
    """
    model, batch_size = run.model, run.budget.batch_size
    segments = run.data.train
    num_queries = max(s.task.num_queries for s in segments)
    vocab_size, seq_len = run.data.vocab_size, run.data.max_seq_len
    d_model, num_layers = model.d_model, model.num_layers
    weights = 16 * (vocab_size * d_model + num_layers * 12 * d_model**2)
    logits = 12 * batch_size * num_queries * vocab_size
    activations = 4 * batch_size * seq_len * num_layers * (12 * d_model + 3 * seq_len)
    if device.type == "cuda":
        free_bytes, most = 0.7 * torch.cuda.mem_get_info(device)[0], 16
    else:
        free_bytes, most = 2 * 2**30, 8
    return int(max(1, min(most, free_bytes // (weights + logits + activations))))


def refuse_duplicates(runs: list[Run]) -> None:
    """Raise InvalidConfig for an empty list or two identical runs."""
    if not runs:
        raise InvalidConfig("the recipe returned no runs.")
    seen: dict[str, int] = {}
    for position, run in enumerate(runs):
        if run.hash in seen:
            raise InvalidConfig(
                f"the recipe's runs {seen[run.hash]} and {position} (counted from 0) are identical "
                f"({run.model_label}, seed {run.seed}, learning rate "
                f"{run.optimizer.learning_rate:g}). Give them different seeds or drop one."
            )
        seen[run.hash] = position


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it however this process ends."""
    path = folder / ".lock"
    try:
        handle = path.open("w")
    except OSError as error:
        raise explain_os_error(error, path) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing to {folder}. Wait for it, or use another folder."
            ) from error
        yield
