"""Memory, turns, spreads and profiles of `speed.py`."""

import contextlib
import fcntl
import gc
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from limits import synchronise

from recallzoo.provenance import commit
from recallzoo.train.packed import device_name


@contextlib.contextmanager
def own_memory(device: torch.device) -> Iterator[None]:
    """Start with the device's memory free, and leave it so."""

    def begin() -> None:
        torch.compiler.reset()
        free(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    begin()
    try:
        yield
    finally:
        begin()


def free(device: torch.device) -> None:
    """Give memory that no tensor holds back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Turn:
    """Whose turn it is on a device that processes share by a file: any number of them prepare, or
    one measures. Without a path there is one process, which may do both at any time.

    Whoever prepares (compiles, checks) may use the device, but nothing is measured meanwhile. A
    process prepares from the start, measures in `with`, and prepares again when it says so.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("w")
        self.prepare()

    def prepare(self) -> None:
        """Wait until nobody measures, and keep others from measuring."""
        self._ask(fcntl.LOCK_SH)

    def __enter__(self) -> None:
        self._ask(fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._ask(fcntl.LOCK_UN)

    def _ask(self, operation: int) -> None:
        if self._file is not None:
            fcntl.flock(self._file, operation)


def peak_gib(device: torch.device) -> float | None:
    """Most memory that tensors took; PyTorch does not count it on the CPU."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest, in milliseconds."""
    named = {"ms": statistics.median(seconds), "min_ms": min(seconds), "max_ms": max(seconds)}
    return {name: round(1000 * value, 4) for name, value in named.items()}


class Profile:
    """Tables of the kernels that take the most time, in one text file.

    A table takes longer than what it is of, so it is made by `write`, when others may measure.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._recorded: list[tuple[str, torch.device, torch.profiler.profile]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    @contextlib.contextmanager
    def recording(self, title: str, device: torch.device) -> Iterator[None]:
        """Record what happens within."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profiler:
            yield
            synchronise(device)
        self._recorded.append((title, device, profiler))

    def write(self) -> None:
        """Append the tables of all that was recorded."""
        for title, device, profiler in self._recorded:
            kind = "cuda" if device.type == "cuda" else "cpu"
            table = profiler.key_averages().table(
                sort_by=f"self_{kind}_time_total", row_limit=30, max_name_column_width=90
            )
            with self._path.open("a") as file:
                file.write(f"{title}, commit {commit()}\n{device_name(device)}\n{table}\n\n")
        self._recorded = []
