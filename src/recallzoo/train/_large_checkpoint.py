"""Checkpoints of a pretraining run: written in the background, whole or absent, read anywhere.

    OUT/checkpoints/step-00001000/
      shard-*.safetensors     weights and AdamW's moments, each process's part of them
      checkpoint.json         step, the run it belongs to, sizes of the files; present means whole

torch.distributed.checkpoint writes and reads the shards, so a run may go on with another number of
processes. The folder gets its name when all is on disk; only then are older ones deleted, so a
full disk or a kill leaves the last good one. Nothing is pickled.
"""

import contextlib
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from recallzoo.errors import StoreError, UserError
from recallzoo.files import TEMPORARY_PREFIX, read_json, write_json
from recallzoo.train._large_model import Processes, stored_buffers

CHECKPOINT_VERSION = 1
ABOUT = "checkpoint.json"

# Said of every save and load in a single process, which is meant; and from another thread, where
# a filter for the time of the call would not reach.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, processes: Processes, run_hash: str, keep: int) -> None:
        self.folder = folder
        self._processes = processes
        self._run_hash = run_hash
        self._keep = keep
        self._saving: tuple[int, Future[Any]] | None = None
        # A group of its own: the thread that saves must not meet the training's own messages.
        self._group: Any = dist.new_group(backend="gloo") if processes.world_size > 1 else None

    def latest(self) -> int | None:
        """The last whole checkpoint's step; None if there is none. StoreError if it is damaged,
        UserError if it is of a newer version or of another run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{self.folder} is a file; checkpoints want a folder there. Move it.")
        steps = finished_steps(self.folder)
        if not steps:
            return None
        check(self._path(steps[-1]), self._run_hash)
        return steps[-1]

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Copy the state and write it in the background. A save under way is waited for."""
        self.finish()
        temporary = self.folder / f"{TEMPORARY_PREFIX}step-{step:08d}"
        if self._processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            # A folder that cannot be made is met again, and explained, by the writer.
            with contextlib.suppress(OSError):
                temporary.mkdir(parents=True)
        self._processes.wait()
        future: Any = async_save(
            dict(state),
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            process_group=self._group,
            no_dist=self._group is None,
        )
        self._saving = (step, future)

    def poll(self) -> int | None:
        """The step of a save that has been completed since the last call; None otherwise. Raises
        StoreError if it failed: older checkpoints are then untouched."""
        return self.finish() if self._saving is not None and self._saving[1].done() else None

    def finish(self) -> int | None:
        """Wait for a save under way and return its step. StoreError if it failed."""
        if self._saving is None:
            return None
        step, future = self._saving
        temporary = self.folder / f"{TEMPORARY_PREFIX}step-{step:08d}"
        try:
            future.result()
            if self._processes.is_first:
                self._publish(step, temporary)
        # What a library's thread raises on a full disk is its own choice; CheckpointException is
        # no Exception.
        except (Exception, CheckpointException) as error:
            self._saving = None
            shutil.rmtree(temporary, ignore_errors=True)
            last = finished_steps(self.folder)
            kept = f"The last one, of step {last[-1]}, is kept." if last else "There is none yet."
            raise StoreError(
                f"could not save a checkpoint at step {step} in {self.folder}: "
                f"{_reason(error)}. {kept}"
            ) from error
        self._saving = None  # only now: who is interrupted above may call again
        return step

    def load(self, step: int, state: dict[str, Tensor]) -> None:
        """Fill the tensors of `state` in place. StoreError if they are not all there."""
        load_tensors(self._path(step), state, distributed=self._group is not None)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _publish(self, step: int, temporary: Path) -> None:
        if finished_steps(self.folder)[-1:] == [step] and not temporary.exists():
            return  # by a call that was interrupted after its renaming
        files = sorted(path for path in temporary.iterdir() if path.name != ABOUT)
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        write_json(
            temporary / ABOUT,
            {
                "checkpoint_version": CHECKPOINT_VERSION,
                "run": self._run_hash,
                "step": step,
                "files": {file.name: file.stat().st_size for file in files},
            },
        )
        self._delete(step)
        temporary.rename(self._path(step))
        for old in finished_steps(self.folder)[: -self._keep]:
            self._delete(old)

    def _delete(self, step: int) -> None:
        """Its name goes first: what has the name of a checkpoint is whole."""
        gone = self.folder / f"{TEMPORARY_PREFIX}old-step-{step:08d}"
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._path(step).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def finished_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending. A user's folders of other names are
    left alone."""
    names = [path.parent.name for path in folder.glob(f"step-*/{ABOUT}")]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name))


def check(path: Path, run_hash: str | None = None) -> None:
    """StoreError if a checkpoint is damaged; UserError if it is of a newer version or, where a run
    is given, of another one."""
    about = read_json(path / ABOUT)
    version = about.get("checkpoint_version") if isinstance(about, dict) else None
    if not isinstance(version, int):
        raise StoreError(f"{path / ABOUT} names no version; it was damaged. {_other(path)}")
    if version > CHECKPOINT_VERSION:
        raise UserError(
            f"{path} was written by a newer recallzoo (checkpoint version {version}, this one "
            f"knows {CHECKPOINT_VERSION}). Upgrade recallzoo, or use another --out."
        )
    run, step, files = (about.get(name) for name in ("run", "step", "files"))
    for name, good in (
        ("run", isinstance(run, str)),
        ("step", isinstance(step, int) and path.name == f"step-{step:08d}"),
        ("files", isinstance(files, dict) and all(isinstance(n, int) for n in files.values())),
    ):
        if not good or not about[name]:
            raise StoreError(
                f"{path / ABOUT} was changed after it was written: {name} is {about.get(name)!r}. "
                f"{_other(path)}"
            )
    if run_hash is not None and run != run_hash:
        raise UserError(
            f"{path} belongs to another run ({run}, this one is {run_hash}). Use another "
            f"--out, or delete {path.parent}."
        )
    for name, size in about["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise StoreError(
                f"{path} is damaged: {name} {state}, {size:,} bytes were written. {_other(path)}"
            )


def load_tensors(path: Path, state: dict[str, Tensor], *, distributed: bool = False) -> None:
    """Fill tensors in place from a checkpoint. StoreError if they are not all there."""
    try:
        load(
            dict(state),
            storage_reader=HuggingFaceStorageReader(str(path)),
            no_dist=not distributed,
        )
    # A damaged file shows in as many ways as there are bytes.
    except (Exception, CheckpointException) as error:
        raise StoreError(
            f"{path} could not be read ({type(error).__name__}: {_reason(error)}). {_other(path)}"
        ) from error


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, AdamW's moments and stored buffers by name: the tensors themselves, to be saved or
    filled."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        moments = optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = moments[moment]
    state |= {f"model.{name}": buffer for name, buffer in stored_buffers(model)}
    return state


def empty_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make AdamW's state as it is after `step` steps, all moments zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _other(path: Path) -> str:
    others = [step for step in finished_steps(path.parent) if path.name != f"step-{step:08d}"]
    if others:
        return f"Delete it and run the same command: training goes on from step {others[-1]}."
    return "Delete it and run the same command: training starts from the beginning."


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[-1].rstrip(".")
