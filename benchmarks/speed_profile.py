"""What the steps of `speed.py --profile` spend their time on, in short.

    python benchmarks/speed_profile.py speed_profile.txt results/speed_h200.json > short.txt
    python benchmarks/speed_profile.py speed_profile.txt results/speed_h200.json --cells 'h3-*'

For every packed step: its milliseconds a run, how they divide among kinds of kernels, and the
kernels that take most. The profile lists the 30 kernels of a step that take the most time; what
others take is told as such, and so is the time in which no kernel ran.
"""

import argparse
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recallzoo.errors import UserError
from recallzoo.files import read_json

OWN = "_"
"""Beginning of the names of our kernels. Each step launches one of those once, so that the fewest
calls of one count steps."""
NO_KERNEL = ("aten::", "Command Buffer Full")
"""Operators, whose kernels have rows of their own, and waiting of the host."""
KINDS = {
    "library products": r"nvjet|cutlass|.*gemm",
    "own kernels": OWN,
    "compiled": r"triton_",
    "of PyTorch": r"",
}
"""By the beginnings of names, in this order."""
MOST_KERNELS = 12
ROW = re.compile(
    r"\s*(?P<name>\S.*?)\s{2,}[\d.]+%.*?\s(?P<time>[\d.]+)(?P<unit>us|ms|s)\s+[\d.]+%"
    r"\s+\S+\s+\S+\s+(?P<calls>\d+)\s*$"
)
TOTAL = re.compile(r"Self CUDA time total: (?P<time>[\d.]+)(?P<unit>us|ms|s)")
US = {"us": 1.0, "ms": 1e3, "s": 1e6}


@dataclass(frozen=True)
class Kernel:
    """What a kernel takes of the time that was recorded."""

    name: str
    us: float
    calls: int


@dataclass(frozen=True)
class Table:
    """A table of PyTorch's profiler, as `speed.py` titles it."""

    cell: str
    num_runs: int
    kernels: list[Kernel]
    total_us: float

    @property
    def num_steps(self) -> int:
        return min(kernel.calls for kernel in self.kernels if kernel.name.startswith(OWN))


def packed_tables(text: str) -> Iterator[Table]:
    """Those of packed steps. UserError for one that does not tell its steps."""
    for part in re.split(r"(?m)^(?=(?:packed|reference), )", text):
        title = re.match(r"packed, (\S+), (\d+) runs", part)
        if title is None:
            continue
        rows = filter(None, map(ROW.match, part.splitlines()))
        kernels = [
            Kernel(row["name"], float(row["time"]) * US[row["unit"]], int(row["calls"]))
            for row in rows
            if not row["name"].startswith(NO_KERNEL)
        ]
        total = TOTAL.search(part)
        if total is None or not any(kernel.name.startswith(OWN) for kernel in kernels):
            raise UserError(
                f"the table of {title[1]} is no profile of a packed step: it has no total, or no "
                f"kernel of ours, which counts the steps."
            )
        yield Table(title[1], int(title[2]), kernels, float(total["time"]) * US[total["unit"]])


def kind_of(name: str) -> str:
    """Of a kernel."""
    return next(kind for kind, start in KINDS.items() if re.match(start, name))


def lines_of(table: Table, step_us: float) -> Iterator[str]:
    """`step_us`: what a run and step takes, timed without the profiler."""
    runs = table.num_runs * table.num_steps
    spent = dict.fromkeys(KINDS, 0.0)
    for kernel in table.kernels:
        spent[kind_of(kernel.name)] += kernel.us / runs
    spent["others"] = table.total_us / runs - sum(spent.values())
    spent["no kernel"] = step_us - table.total_us / runs
    shares = ", ".join(f"{kind} {us:.0f} ({us / step_us:.0%})" for kind, us in spent.items())
    yield f"{table.cell}, {table.num_runs} runs: {step_us:.0f} us a run and step: {shares}"
    largest = sorted(table.kernels, key=lambda kernel: -kernel.us)[:MOST_KERNELS]
    for kernel in largest:
        us, times = kernel.us / runs, kernel.calls / table.num_steps
        yield f"  {us / step_us:6.1%} {us:8.1f} us x {times:4.1f}  {kernel.name[:80]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("profile", type=Path, help="what speed.py --profile wrote")
    parser.add_argument("speed", type=Path, help="what the same command wrote as --out")
    parser.add_argument("--cells", nargs="+", default=["*"], help="patterns of names; all if none")
    options = parser.parse_args()
    speed = read_json(options.speed)
    steps_us = {cell["cell"]: 1000 * cell["ms_per_run_and_step"] for cell in speed["cells"]}
    tables = [
        table
        for table in packed_tables(options.profile.read_text())
        if any(fnmatch.fnmatch(table.cell, pattern) for pattern in options.cells)
    ]
    if not tables:
        parser.error(f"{options.profile} has no packed step of {' '.join(options.cells)}")
    if missing := {table.cell for table in tables} - steps_us.keys():
        parser.error(
            f"{options.speed} has no {' '.join(sorted(missing))}: it is of another command. Give "
            f"what was written with the profile, or leave them out with --cells"
        )
    print(f"{speed['device']}, commit {speed['commit']}; us a run and step, and calls a step\n")
    for table in tables:
        print(*lines_of(table, steps_us[table.cell]), "", sep="\n")


if __name__ == "__main__":
    main()
