"""Train runs of equal shape together, and let each leave when it is done.

    pack = Pack(runs, device)
    for result in pack.train():      # results come as runs finish, in any order
        store.write(result)

A run's data order, initialisation and dropout follow from its own seed, so its result does not
depend on which runs it is packed with, beyond the rounding of batched products.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recallzoo.errors import StoreError
from recallzoo.evaluate.accuracy import slice_rows
from recallzoo.files import atomic_file
from recallzoo.mixers import Mixer, MixerConfig, state_size
from recallzoo.provenance import environment
from recallzoo.random import seed_of
from recallzoo.result import Result, SliceRow, Status
from recallzoo.run import Run
from recallzoo.tasks import make_splits
from recallzoo.train._adamw import PackedAdamW
from recallzoo.train._compiling import whether_to_compile
from recallzoo.train._program import Program
from recallzoo.train._stack import stack_models

CHECKPOINT_VERSION = 2
MAX_COMPUTED_STATE = 2**20
"""Width times tokens up to which the size of a state is found by computing it. Tensors without
numbers would do, but a step on them takes PyTorch 1 to 3 ms whatever its size, and the first one
loads the compiler (2 s); copying a state that grows takes longer than that from here on."""


@dataclass
class Progress:
    """How far a pack is; made once an epoch and every few seconds."""

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    num_active: int
    num_runs: int
    train_loss_nats: list[float]
    """One for each active run."""
    best_valid_accuracy: float | None


@dataclass
class PackOptions:
    """How to train, not what: none of these changes a result beyond rounding."""

    compiled: bool | None = None
    """Whether to compile the step; None compiles on CUDA, where that is expected to pay."""
    progress_seconds: float = 2.0
    checkpoint_seconds: float = 60.0
    checkpoint: Path | None = None
    """File for checkpoints; None keeps none."""
    on_progress: Callable[[Progress], None] | None = None
    deadline: float | None = None
    """Value of `time.monotonic()` at which training stops, to go on later; None never."""


@dataclass
class _Member:
    """One run of a pack while it trains."""

    run: Run
    row: int
    """Where it is in the program."""
    metrics: list[dict[str, Any]] = field(default_factory=list)


class Pack:
    """Runs with equal `pack_key`, on one device."""

    def __init__(
        self, runs: list[Run], device: torch.device | str, options: PackOptions | None = None
    ) -> None:
        if len({run.pack_key for run in runs}) != 1:
            raise ValueError("runs of one pack must have equal pack_key")
        self.runs = runs
        self.device = torch.device(device)
        self.options = options or PackOptions()
        self._members = [_Member(run, row) for row, run in enumerate(runs)]
        self._epoch = 0
        self._seconds_before = 0.0
        self._step_seconds = 0.0
        deadline = self.options.deadline
        self._deadline = math.inf if deadline is None else deadline

        data = runs[0].data
        splits = make_splits(data, self.device)
        self._train, self._valid, self._test = splits["train"], splits["valid"], splits["test"]
        self.budget = runs[0].budget
        self.steps_per_epoch = sum(len(b) // self.budget.batch_size for b in self._train)
        self.num_steps = self.steps_per_epoch * self.budget.num_epochs

        stack = stack_models(runs, self.device)
        adamw = PackedAdamW(
            runs, stack.parameters, stack.rules, self.num_steps, self.steps_per_epoch
        )
        choice = self.options.compiled
        compiled, self._not_compiled = whether_to_compile(choice, self.device, runs)
        self._program = Program(runs, stack, adamw, self._train, self.device, compiled=compiled)
        self._num_parameters = stack.num_parameters
        self._state_size = _state_size(runs[0])

    def train(self) -> Iterator[Result]:
        """Train to the end, or go on from the last checkpoint. Yields each run's result.

        With a deadline it ends early, with a checkpoint, where the epochs up to the next look at
        the validation set are not expected to fit; `is_done` tells. Those up to the first look
        are broken off, as there was nothing to expect their time from.
        """
        self._load_checkpoint()
        self._started = self._last_checkpoint = time.monotonic()
        breaks_off_at = self._deadline
        while self._members:
            began, compiled = time.monotonic(), self._program.all_compile_seconds
            if not self._train_until_evaluation(breaks_off_at):
                return
            breaks_off_at = math.inf
            yield from self._leave()
            now = time.monotonic()
            took = now - began - (self._program.all_compile_seconds - compiled)
            is_last = now + took > self._deadline
            if is_last or now - self._last_checkpoint > self.options.checkpoint_seconds:
                self._save_checkpoint()
            if is_last:
                return

    @property
    def is_done(self) -> bool:
        """Whether every run has its result."""
        return not self._members

    def _train_until_evaluation(self, breaks_off_at: float) -> bool:
        """Train up to the next look at the validation set, and look. False where that time came
        first: what was trained since the last look is lost then."""
        program = self._program
        epochs = min(self.budget.evaluate_every, self.budget.num_epochs - self._epoch)
        steps_before = int(program.step)
        program.loss_sum.zero_()
        started = last_report = time.monotonic()
        compiled_before = program.all_compile_seconds
        for _ in range(epochs):
            next_batch = [0] * len(self._train)
            for done, segment in enumerate(program.start_epoch(self._epoch), start=1):
                program.train_step(segment, next_batch[segment])
                next_batch[segment] += 1
                now = time.monotonic()
                if now > breaks_off_at:
                    return False
                if now - last_report > self.options.progress_seconds:
                    self._report(self._epoch * self.steps_per_epoch + done, steps_before)
                    last_report = time.monotonic()
            self._epoch += 1
        num_steps = self._epoch * self.steps_per_epoch - steps_before
        losses = (program.loss_sum / num_steps).tolist()
        compiling = program.all_compile_seconds - compiled_before
        self._step_seconds = (time.monotonic() - started - compiling) / num_steps
        valid_losses, correct = program.evaluate(self._valid)
        accuracy = _accuracy(correct)
        for member in self._members:
            i = member.row
            member.metrics.append(
                {
                    "epoch": self._epoch,
                    "step": self._epoch * self.steps_per_epoch,
                    "train_loss_nats": _finite(losses[i]),
                    "valid_loss_nats": _finite(float(valid_losses[i])),
                    "valid_accuracy": accuracy[i],
                }
            )
        self._report(self._epoch * self.steps_per_epoch, steps_before)
        return True

    def _leave(self) -> Iterator[Result]:
        """Results of the runs that are done, which leave the pack."""
        diverged = self._first_bad_steps()
        status: dict[int, Status] = {}
        solved_groups = set()
        for member in self._members:
            stop = self.budget.stop_accuracy
            if diverged[member.row] is not None:
                status[member.row] = "diverged"
            elif stop is not None and member.metrics[-1]["valid_accuracy"] >= stop:
                status[member.row] = "solved"
                solved_groups.add(member.run.group_key)
            elif self._epoch >= self.budget.num_epochs:
                status[member.row] = "finished"
        if self.budget.stop_group:
            for member in self._members:
                if member.run.group_key in solved_groups:
                    status.setdefault(member.row, "group_solved")
        if not status:
            return
        test_losses, correct = self._program.evaluate(self._test)
        seconds = self._seconds_before + time.monotonic() - self._started
        for member in self._members:
            if member.row in status:
                why = status[member.row]
                yield self._result(
                    member,
                    why,
                    float(test_losses[member.row]),
                    [c[member.row] for c in correct],
                    diverged[member.row],
                    seconds / len(self.runs),
                )
        self._members = [member for member in self._members if member.row not in status]
        if self._members and self._shrinking_pays():
            self._shrink()

    def _first_bad_steps(self) -> dict[int, int | None]:
        """By row, the first step whose loss was not finite; None where all were. What the last
        step spoilt, no later one sees: the validation loss is the loss of the step after it."""
        found: dict[int, int | None] = {}
        steps = self._program.first_bad_step.tolist()
        for member in self._members:
            step, last = steps[member.row], member.metrics[-1]
            is_spoilt = self._epoch >= self.budget.num_epochs and last["valid_loss_nats"] is None
            found[member.row] = step if step >= 0 else (last["step"] if is_spoilt else None)
        return found

    def _shrinking_pays(self) -> bool:
        """Whether the time that the runs which are done would still take is worth compiling for
        fewer. Until then they ride along, unseen."""
        program = self._program
        steps_left = (self.budget.num_epochs - self._epoch) * self.steps_per_epoch
        saved = steps_left * self._step_seconds * (1 - len(self._members) / len(program.runs))
        return saved >= program.compile_seconds

    def _shrink(self) -> None:
        self._program.keep([member.row for member in self._members])
        for row, member in enumerate(self._members):
            member.row = row

    def _result(
        self,
        member: _Member,
        status: Status,
        test_loss: float,
        correct: list[Tensor],
        diverged_step: int | None,
        seconds: float,
    ) -> Result:
        run, last = member.run, member.metrics[-1]
        rows: list[SliceRow] = slice_rows(self._test, correct)
        return Result(
            hash=run.hash,
            group=run.group_key,
            label=run.model_label,
            config=run.config,
            status=status,
            steps=last["step"],
            epochs=last["epoch"],
            train_loss_nats=last["train_loss_nats"],
            valid_loss_nats=last["valid_loss_nats"],
            valid_accuracy=last["valid_accuracy"],
            test_loss_nats=_finite(test_loss),
            test_accuracy=_accuracy([c[None] for c in correct])[0],
            num_parameters=self._num_parameters,
            state_size=self._state_size,
            train_seconds=seconds,
            diverged_step=diverged_step,
            provenance={
                **environment(),
                "device": device_name(self.device),
                "pack_size": len(self.runs),
                "compiled": self._program.is_compiled,
                "not_compiled": self._not_compiled,
                "fallbacks": list(self._program.fallbacks),
            },
            metrics=member.metrics,
            rows=rows,
        )

    def _report(self, step: int, steps_before: int) -> None:
        if self.options.on_progress is None:
            return
        taken = max(1, step - steps_before)
        seen = [m.metrics[-1]["valid_accuracy"] for m in self._members if m.metrics]
        self.options.on_progress(
            Progress(
                epoch=self._epoch,
                num_epochs=self.budget.num_epochs,
                step=step,
                num_steps=self.num_steps,
                num_active=len(self._members),
                num_runs=len(self.runs),
                train_loss_nats=(self._program.loss_sum / taken)[
                    [member.row for member in self._members]
                ].tolist(),
                best_valid_accuracy=max(seen, default=None),
            )
        )

    def _save_checkpoint(self) -> None:
        path = self.options.checkpoint
        self._last_checkpoint = time.monotonic()
        if path is None or not self._members:
            return
        state = {
            "checkpoint_version": CHECKPOINT_VERSION,
            "epoch": self._epoch,
            "seconds": self._seconds_before + time.monotonic() - self._started,
            "members": [{"hash": m.run.hash, "metrics": m.metrics} for m in self._members],
        }
        tensors = {
            n: t.contiguous().cpu()
            for n, t in self._program.state_dict([m.row for m in self._members]).items()
        }
        state["sha256"] = _digest(state, tensors)
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {"state": json.dumps(state, allow_nan=False)})

    def _load_checkpoint(self) -> None:
        path = self.options.checkpoint
        if path is None or not path.exists():
            return
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
            if state["checkpoint_version"] != CHECKPOINT_VERSION:
                raise StoreError(
                    f"checkpoint {path} was written by another version of recallzoo. Delete it to "
                    f"train this pack from the start; finished runs are not affected."
                )
            tensors = load_file(path)
            if state.pop("sha256") != _digest(state, tensors):
                raise ValueError("its content is not what was written")
            by_hash = {run.hash: i for i, run in enumerate(self.runs)}
            staying = [by_hash[m["hash"]] for m in state["members"]]
            if len(staying) < len(self.runs):
                self._program.keep(staying)
            self._program.load_state_dict({n: t.to(self.device) for n, t in tensors.items()})
        except (
            safetensors.SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
            OSError,
        ) as error:
            raise StoreError(
                f"checkpoint {path} is damaged ({type(error).__name__}: {error}). Delete it to "
                f"train this pack from the start; finished runs are not affected."
            ) from error
        self._members = [
            _Member(self.runs[by_hash[m["hash"]]], row, m["metrics"])
            for row, m in enumerate(state["members"])
        ]
        self._epoch = state["epoch"]
        self._seconds_before = state["seconds"]


def _digest(state: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of what a checkpoint holds, as its format has no checksum."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_members(path: Path) -> set[str] | None:
    """Hashes of the runs that a checkpoint goes on with; None without one, or where it is damaged,
    which whoever loads it tells."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {member["hash"] for member in json.loads(file.metadata()["state"])["members"]}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError):
        return None


def device_name(device: torch.device) -> str:
    """The device as a person would name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _accuracy(correct: list[Tensor]) -> list[float]:
    """Share of right answers of each run, over [R, N, Q] tensors."""
    right = sum(c.flatten(1).sum(1) for c in correct)
    total = sum(c[0].numel() for c in correct)
    assert isinstance(right, Tensor)
    return (right.double() / total).tolist()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _state_size(run: Run) -> dict[str, int]:
    """State after the longest sequence, by kind; empty without a recurrent form."""
    total: dict[str, int] = {}
    for config in run.model.layer_mixers():
        sizes = _state_of_mixer(config, run.model.d_model, run.data.max_seq_len)
        if sizes is None:
            return {}
        for kind, size in sizes.items():
            total[kind] = total.get(kind, 0) + size
    return total


@functools.cache
def _state_of_mixer(config: MixerConfig, d_model: int, seq_len: int) -> dict[str, int] | None:
    """State of one layer after `seq_len` tokens, by kind; None if it has no recurrent form.

    It follows from the arguments alone, so layers and packs share it: a mixer of the user's own
    that looks at values gets weights of a fixed seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("state size"))
        mixer = config.build(d_model, seq_len)
        if d_model * seq_len > MAX_COMPUTED_STATE:
            with contextlib.suppress(Exception):
                return _state_by_shape(mixer, seq_len)
        try:
            return state_size(mixer, seq_len)
        except Exception as error:
            # A step that the CPU cannot compute, such as a kernel for CUDA, may know its shapes.
            with contextlib.suppress(Exception):
                return _state_by_shape(mixer, seq_len)
            if isinstance(error, AttributeError | NotImplementedError):
                return None
            raise


def _state_by_shape(mixer: Mixer, seq_len: int) -> dict[str, int]:
    return state_size(copy.deepcopy(mixer).to("meta"), seq_len)
