"""What is seen and kept of a pretraining run while it runs."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from recallzoo.errors import StoreError, UserError
from recallzoo.files import explain_os_error, write_text
from recallzoo.options import fits
from recallzoo.schemas import is_finite

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
"""How a run went, and what came of it: files of its folder."""
_GO_ON = (
    "Put it right, or move the file away and run the same command: training goes on, and only the "
    "metrics before are missing."
)
_NEEDED = {"loss_nats": ("seconds",), "valid_loss_nats": ()}
"""What a line of a step, and one of a look at the validation split, has beside it."""


class Metrics:
    """`metrics.jsonl`, one line a step or look at the validation split, and optional sinks."""

    def __init__(self, folder: Path, sinks: list[Callable[[int, dict[str, Any]], None]]) -> None:
        self._path = folder / METRICS
        self._sinks = sinks

    def start(self, step: int) -> None:
        """Keep the lines up to a step: those after it are of work that was lost, and is redone."""
        kept = [line for line in read_metrics(self._path.parent) if line["step"] <= step]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line."""
        line = json.dumps({"step": step, **values}, allow_nan=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise explain_os_error(error, self._path) from error
        for sink in self._sinks:
            sink(step, values)


def read_metrics(folder: Path, remedy: str = _GO_ON) -> list[dict[str, Any]]:
    """The lines of a run's metrics; none if there is no file. A kill may have cut the last one,
    which is left out. StoreError, which ends with the `remedy`, if another one is damaged."""
    path = folder / METRICS
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise StoreError(f"could not read {path}: {error.strerror or error}.") from error
    found = [_whole(line) for line in lines]
    if found and found[-1] is None:
        found.pop()
    if None in found:
        raise StoreError(
            f"line {found.index(None) + 1} of {path} is damaged, where a step with finite numbers "
            f"is wanted. {remedy}"
        )
    return [line for line in found if line is not None]


def _whole(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not fits(values.get("step"), int):
        return None
    for name, others in _NEEDED.items():
        if name in values and any(values.get(one) is None for one in (name, *others)):
            return None
    is_whole = all(fits(value, float | None) and is_finite(value) for value in values.values())
    return values if is_whole else None


def open_sinks(
    folder: Path, wandb: str | None, tensorboard: bool, config: dict[str, Any]
) -> list[Callable[[int, dict[str, Any]], None]]:
    """The sinks asked for. UserError, naming what to install, for one that is not there."""
    sinks: list[Callable[[int, dict[str, Any]], None]] = []
    if wandb is not None:
        module = _import("wandb", "--wandb", "wandb")
        run = module.init(project=wandb, name=folder.name, dir=str(folder), config=config)
        sinks.append(lambda step, values: run.log(values, step=step))
    if tensorboard:
        module = _import("torch.utils.tensorboard", "--tensorboard", "tensorboard")
        writer = module.SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(step: int, values: dict[str, Any]) -> None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, step)
            writer.flush()

        sinks.append(to_tensorboard)
    return sinks


def _import(module: str, option: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{option} needs the package {package}, which is not installed. Install it with "
            f"`pip install 'recallzoo[{package}]'`, or leave the option out: metrics.jsonl has "
            f"all metrics in any case."
        ) from error


class PretrainProgress:
    """Tells a terminal, or a log, how a run goes. Writes to stderr, or nowhere if not `shown`."""

    def __init__(self, shown: bool, log_seconds: float, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._shown = shown
        self._log_seconds = log_seconds
        self._bar: tqdm | None = None
        self._last_line = -float("inf")
        self._num_steps = 0
        self.warnings: list[str] = []

    def start(self, step: int, num_steps: int) -> None:
        """Training is about to begin."""
        self._num_steps = num_steps
        if self._shown and self._stream.isatty():
            self._bar = tqdm(
                initial=step,
                total=num_steps,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
            )

    def stepped(self, step: int, values: dict[str, Any]) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(_line(values))
        elif time.monotonic() - self._last_line >= self._log_seconds or step == self._num_steps:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._num_steps}, {_line(values)}")

    def validated(self, step: int, values: dict[str, Any]) -> None:
        """A look at the validation split is done."""
        losses = [
            f"{name.removeprefix('valid_').removesuffix('_loss_nats')} {value:.3f}"
            for name, value in values.items()
            if name.endswith("_loss_nats") and name != "valid_loss_nats" and value is not None
        ]
        total = f"validation loss {values['valid_loss_nats']:.3f}"
        self.say(f"step {step}: {total}" + (f" ({', '.join(losses)})" if losses else ""))

    def warned(self, message: str) -> None:
        """Something was left out or done otherwise: said at once, and kept with the result."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.say(f"note: {message}")

    def say(self, line: str) -> None:
        """Print a line."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def end(self) -> None:
        """Training is over, one way or the other."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _line(values: dict[str, Any]) -> str:
    parts = [
        f"loss {values['loss_nats']:.4f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
    ]
    if values.get("mfu") is not None:
        parts.append(f"MFU {100 * values['mfu']:.1f} %")
    if values.get("peak_memory_gib") is not None:
        parts.append(f"{values['peak_memory_gib']:.1f} GiB")
    return ", ".join(parts)
