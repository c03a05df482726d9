"""What the parts of `several_gpus.py` share: options, the record, and how children are started."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import children
import text_speed
import torch
from several_gpus_record import Record, Row

from recallzoo.provenance import environment
from recallzoo.text.data import MANIFEST

REPOSITORY = Path(__file__).resolve().parents[1]
UNTIMED_STEPS = 5
NAMES = ("preset", "parallel", "processes", "devices", "killed_workers")
TOLD = (
    "status",
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "seconds",
    "efficiency",
    "killed",
    "against_one_process",
    "against_undisturbed",
    "table_against",
    "notes",
)
"""What is printed of a row; the file has all of it."""


class Bench:
    """One call: its options, its record, and how children are started."""

    def __init__(self, args: argparse.Namespace, sweep_options: list[str], command: str) -> None:
        self.args = args
        self.sweep_options = sweep_options
        self.on_cpu = args.device == "cpu"
        self.device = "CPU" if self.on_cpu else torch.cuda.get_device_name(0)
        self.processes: int = args.processes or (2 if self.on_cpu else torch.cuda.device_count())
        self.work: Path = args.work
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PYTHONUNBUFFERED": "1",
        }
        self.environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.work / "inductor"))
        self.environment.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
        about = {
            "commands": [command],
            "device": self.device,
            "devices": 0 if self.on_cpu else torch.cuda.device_count(),
            "versions": environment(),
            "efficiency": "rate of n / (n rate of 1), at the same global batch",
            "untimed_steps": UNTIMED_STEPS,
            "environment": {name: os.environ[name] for name in children.NO_MULTICAST},
        }
        self.record = Record(args.out, about)

    def data(self) -> Path:
        """The folder given, or one of synthetic tokens."""
        args = self.args
        if args.data is not None:
            return args.data
        tokens = args.steps * args.global_batch * (args.context + 1) + 4 * args.context
        folder = self.work / f"data-{args.vocab_size}-{tokens}"
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)
            text_speed.VOCAB_SIZE = args.vocab_size
            text_speed.zipf_data(folder, max(tokens, 10 * text_speed.DOCUMENT_TOKENS))
        return folder

    def child(
        self, command: list[str], name: str, changed: dict[str, str] | None = None, **places: Path
    ) -> children.Child:
        """Started, with folders in the place of their names in the command, output in a log."""
        print(f"{name}: started", flush=True)
        words = [str(places.get(word, word)) for word in command]
        log = self.work / "logs" / f"{name}.log"
        return children.Child(
            [sys.executable, *words[1:]], log, {**self.environment, **(changed or {})}
        )

    def failed(self, name: str, end: children.End) -> Row:
        """What is kept of a child that did not do what it should; its last words are shown."""
        lines = end.last_lines()
        print("\n".join([f"{name}: {end.status}", *(f"    {line}" for line in lines)]), flush=True)
        return {"status": end.status, "wall_seconds": end.seconds, "last_lines": lines[-3:]}

    def keep(self, part: str, row: Row) -> None:
        """Into the file, and a line of it to the terminal."""
        self.record.keep(part, row)
        show(part, row)


def show(part: str, row: Row) -> None:
    """Print what matters of a row."""
    told = {name: row["settings"][name] for name in NAMES if name in row["settings"]}
    told |= {name: row[name] for name in TOLD if row.get(name) is not None}
    print(f"{part}: {json.dumps(told)}", flush=True)
