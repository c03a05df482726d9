"""What is seen of a sweep while it runs: a live line a pack, plain lines without a terminal."""

import math
import sys
import time
from typing import TextIO

from tqdm import tqdm

from recallzoo.result import Result
from recallzoo.run import Run
from recallzoo.train.packed import Progress

PLAIN_LINE_SECONDS = 10.0
"""Time between two lines about a pack when the output is no terminal."""


class SweepProgress:
    """Tells a terminal, or a log, how a sweep goes. Writes to stderr."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_live = self._stream.isatty()
        self._bar: tqdm | None = None
        self._pack = ""
        self._last_line = 0.0
        self._num_runs = self._num_finished = 0
        self._beside: list[SweepProgress] = []
        self.warnings: list[str] = []

    def sweep_started(self, num_runs: int, num_finished: int, num_packs: int) -> None:
        self._num_runs, self._num_finished = num_runs, num_finished
        todo = num_runs - num_finished
        kept = f", {num_finished} finished before" if num_finished else ""
        what = f", {todo} to train in {num_packs} pack{'s' * (num_packs != 1)}" if todo else ""
        self._say(f"{num_runs} run{'s' * (num_runs != 1)}{kept}{what}")

    def beside(self) -> "SweepProgress":
        """One that follows a pack of its own, where several train at once."""
        other = SweepProgress(self._stream)
        self._beside = [*(one for one in self._beside if one._bar is not None), other]
        return other

    def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None:
        first = runs[0]
        self._pack = f"pack {number}/{num_packs} {first.model_label} d={first.model.d_model}"
        if self._is_live:
            self._bar = tqdm(
                desc=self._pack,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n}/{total} steps "
                "[{elapsed}<{remaining}{postfix}]",
                total=0,
            )
        else:
            self._say(f"{self._pack}: {len(runs)} run{'s' * (len(runs) != 1)}")
            self._last_line = time.monotonic()

    def pack_progressed(self, progress: Progress) -> None:
        if self._bar is not None:
            self._bar.total = progress.num_steps
            self._bar.n = progress.step
            self._bar.set_postfix_str(_state(progress))
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            left = progress.num_steps - progress.step
            self._say(
                f"{self._pack}: step {progress.step}/{progress.num_steps}, {left} left, "
                f"{_state(progress)}"
            )
            self._last_line = time.monotonic()

    def run_finished(self, result: Result) -> None:
        self._num_finished += 1
        if not self._is_live:
            optimizer = result.config["optimizer"]
            self._say(
                f"run {self._num_finished}/{self._num_runs} {result.label}: {result.status}, "
                f"test accuracy {result.test_accuracy:.3f}, learning rate "
                f"{optimizer['learning_rate']:g}, seed {result.config['seed']}, "
                f"{result.epochs} epochs"
            )

    def pack_ended(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def warned(self, message: str) -> None:
        self.warnings.append(message)
        self._say(f"warning: {message}")

    def _say(self, line: str) -> None:
        bars = [one._bar for one in (self, *self._beside) if one._bar is not None]
        if bars:
            bars[0].write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)


def _state(progress: Progress) -> str:
    losses = [loss for loss in progress.train_loss_nats if math.isfinite(loss)]
    best = progress.best_valid_accuracy
    return ", ".join(
        [
            f"loss {min(losses):.3f}" if losses else "loss not finite",
            "accuracy -" if best is None else f"accuracy {best:.3f}",
            f"{progress.num_active} of {progress.num_runs} runs left",
        ]
    )
