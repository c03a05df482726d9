"""What a worker of a cluster does: train one pack into the shared results folder."""

import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from recallzoo._version import __version__
from recallzoo.errors import RecallzooError, UserError
from recallzoo.executors.devices import runs_that_fit
from recallzoo.run import Run
from recallzoo.store import Store
from recallzoo.train.packed import Pack, PackOptions


@dataclass(frozen=True)
class Outcome:
    """How a pack ended. Errors travel as text, as not every exception survives the journey."""

    what: Literal["done", "out of memory", "failed"]
    message: str = ""
    exit_code: int = 0


def train_on_worker(
    runs: list[Run],
    folder: str,
    name: str,
    device: str,
    compiled: bool | None,
    checkpoint_seconds: float,
    mailbox: Any,
    driver_version: str,
) -> Outcome:
    """Train a pack to its end, or go on from its checkpoint. Each result is in the store before
    training goes on, as the next checkpoint will not know of it."""
    mailbox.put.remote(name, None)
    try:
        _require_same_version(driver_version)
        store = _open(folder)
        pack_folder = store.folder / "packs" / name
        pack = Pack(
            runs,
            device,
            PackOptions(
                compiled=compiled,
                checkpoint=pack_folder / "checkpoint.safetensors",
                checkpoint_seconds=checkpoint_seconds,
                on_progress=lambda progress: mailbox.put.remote(name, progress),
            ),
        )
        for result in pack.train():
            store.write(result)
    except torch.OutOfMemoryError:
        return Outcome("out of memory")
    except RecallzooError as error:
        return Outcome("failed", f"{error} (worker on {socket.gethostname()})", error.exit_code)
    shutil.rmtree(pack_folder, ignore_errors=True)
    return Outcome("done")


def fit_on_worker(run: Run, device: str) -> int:
    """How many runs like this one fit onto the worker's device."""
    return runs_that_fit(run, torch.device(device))


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
