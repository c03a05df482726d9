"""Memory, locks, spreads and profiles of `speed.py`."""

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

    def free() -> None:
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    free()
    try:
        yield
    finally:
        free()


class Lock:
    """A file that one process at a time may hold; without a path, nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("w")

    def __enter__(self) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)


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
    """Tables of the kernels that take the most time, in one text file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    @contextlib.contextmanager
    def recording(self, title: str, device: torch.device) -> Iterator[None]:
        """Append the table of what happens within."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profiler:
            yield
            synchronise(device)
        kind = "cuda" if device.type == "cuda" else "cpu"
        table = profiler.key_averages().table(
            sort_by=f"self_{kind}_time_total", row_limit=30, max_name_column_width=90
        )
        with self.path.open("a") as file:
            file.write(f"{title}, commit {commit()}\n{device_name(device)}\n{table}\n\n")
