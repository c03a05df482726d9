"""Cells of `speed.py` in processes of their own, many beside one another."""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from children import Child, End, end_with_children
from speed_cells import Cell
from speed_results import command, concluded, merge, print_cell

from recallzoo.errors import UserError
from recallzoo.files import read_json

PASSED_ON = ("device", "precision", "repeats", "interval", "cell_seconds", "clock", "threads")
CELL_SECONDS = 900.0
"""Most that a process may take, its waiting for others included."""


def waves(cells: list[Cell], at_once: int) -> list[list[Cell]]:
    """Cells to be measured together, each wave with large and small ones."""
    number = math.ceil(len(cells) / at_once)
    ordered = sorted(cells, key=lambda cell: -cell.seq_len * cell.architecture.d_model)
    return [ordered[first::number] for first in range(number)]


def run_in_waves(cells: list[Cell], options: argparse.Namespace) -> int:
    """Measure each cell in a process, `--processes` at once on each GPU, and make one result of
    theirs, which is written anew after each. 1 if a cell failed."""
    end_with_children()
    earlier = [] if options.keep is None else [options.keep]
    gpus = options.gpus or [None]
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, lost = [], []
        for wave in waves(cells, options.processes * len(gpus)):
            children = {
                cell.name: _start(cell, folder, gpus[i % len(gpus)], len(wave), options)
                for i, cell in enumerate(wave)
            }
            for cell, end in _ends(children):
                path = folder / f"{cell}.json"
                if not path.exists():
                    lost.append(cell)
                    print(f"{cell:<22} {end.status}: " + "\n".join(end.last_lines()), flush=True)
                    continue
                found.append(path)
                print_cell(read_json(path)["cells"][0])
                entries = merge([*earlier, *found], options.out, command())
            if options.profile:
                texts = [folder / f"{cell.name}.txt" for cell in cells]
                with options.profile.open("w") as file:
                    file.writelines(text.read_text() for text in texts if text.exists())
    code = concluded(entries)
    if lost:
        raise UserError(f"not measured: {', '.join(lost)}. Their last words are above.")
    return code


def _start(
    cell: Cell, folder: Path, gpu: str | None, beside: int, options: argparse.Namespace
) -> Child:
    words = [sys.executable, str(Path(__file__).with_name("speed.py")), "--cells", cell.name]
    words += ["--out", f"{folder / cell.name}.json", "--lock", str(folder / f"gpu-{gpu}.lock")]
    if options.reference is None:
        words.append("--skip-reference")
    else:
        words += ["--reference", str(options.reference)]
    for name in PASSED_ON:
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.pack_sizes:
        words += ["--pack-sizes", *map(str, options.pack_sizes)]
    if options.profile:
        words += ["--profile", f"{folder / cell.name}.txt"]
    cores = str(max(1, len(os.sched_getaffinity(0)) // beside))
    environment = {"OMP_NUM_THREADS": cores, "TORCHINDUCTOR_COMPILE_THREADS": cores, **os.environ}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return Child(words, folder / f"{cell.name}.log", environment)


def _ends(children: dict[str, Child]) -> Iterator[tuple[str, End]]:
    """Each cell's name and end as it comes. None is left behind."""
    waiting = dict(children)
    try:
        while waiting:
            for cell, child in list(waiting.items()):
                if child.process.poll() is None and not _is_late(child):
                    continue
                end = child.wait(CELL_SECONDS)
                assert end is not None
                del waiting[cell]
                yield cell, end
            time.sleep(0.1)
    finally:
        for child in waiting.values():
            child.stop()


def _is_late(child: Child) -> bool:
    return time.monotonic() - child.began > CELL_SECONDS
