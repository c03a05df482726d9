"""A sweep through Ray on 1 and on n devices and with a worker killed: part of `several_gpus.py`."""

import shutil
import time
from pathlib import Path
from typing import Any

import children
from several_gpus_bench import Bench
from several_gpus_record import Row

from recallzoo.files import read_json
from recallzoo.store import Store

WORKERS = ("ray::PackWorker.train", "ray::train_on_worker")
"""How Ray names a process that trains a pack."""


def sweep_settings(bench: Bench, devices: int, killed_workers: int) -> dict[str, Any]:
    """What names a sweep in the record."""
    return {
        "recipe": "figure2",
        "options": " ".join(bench.sweep_options),
        "device": bench.device,
        "devices": devices,
        "killed_workers": killed_workers,
        "cold": bench.args.cold,
    }


def sweep_command(bench: Bench, devices: int, options: list[str], *extra: str) -> list[str]:
    """The command line of one sweep, OUT in the place of its folder."""
    words = ["python", "-m", "recallzoo", "run", "figure2", *options, "--executor", "ray"]
    words += ["--devices", str(devices), "--device", "cpu" if bench.on_cpu else "cuda"]
    if not bench.on_cpu:  # short as it is, it stands for a long sweep
        words += ["--compile", "step"]
    return [*words, "--out", "OUT", *extra]


def sweep_row(bench: Bench, devices: int, kill: bool = False) -> None:
    """Run the recipe on so many devices and keep its table."""
    settings = sweep_settings(bench, devices, int(kill))
    if bench.record.find("sweep", settings):
        return
    name = f"sweep-{devices}" + ("-killed" if kill else "")
    out = bench.work / name
    shutil.rmtree(out, ignore_errors=True)
    extra = ["--checkpoint-seconds", str(bench.args.checkpoint_seconds)] if kill else []
    command = sweep_command(bench, devices, bench.sweep_options, *extra)
    row: Row = {"settings": settings, "command": " ".join(command)}
    changed = {"TORCHINDUCTOR_CACHE_DIR": str(bench.work / f"cold-{name}")}
    driver = bench.child(command, name, changed if bench.args.cold else None, OUT=out)
    end = None
    if kill:
        row["killed"] = {"workers": 0}

        def kept() -> list[Path]:
            saved = [*out.glob("packs/*/checkpoint.safetensors")]
            return [*saved, *out.glob("runs/*/result.json")]

        def done_and_killed() -> bool:
            worker = children.ray_worker(driver.process.pid, WORKERS) if kept() else None
            if worker is None or not children.kill(worker):
                return False
            row["killed"] = {
                "workers": 1,
                "after_seconds": time.monotonic() - driver.began,
                "runs_finished": len(list(out.glob("runs/*/result.json"))),
            }
            return True

        end = driver.wait(bench.args.child_seconds, until=done_and_killed)
    if end is None:
        end = driver.wait(bench.args.child_seconds)
        assert end is not None
    if end.status == "done":
        row |= swept(out, end)
        if kill:
            text = end.log.read_text(encoding="utf-8", errors="replace")
            row["killed"]["was_told"] = "worker was lost" in text
    else:
        row |= bench.failed(name, end)
    bench.keep("sweep", row)
    shutil.rmtree(bench.work / f"cold-{name}", ignore_errors=True)


def swept(out: Path, end: children.End) -> Row:
    """Times and the table of a finished sweep."""
    kept = out / "sweep.json"
    calls = read_json(kept)["calls"] if kept.exists() else []
    told = calls[-1] if calls else {}
    table = {
        result.hash: {
            "label": result.label,
            "status": result.status,
            "steps": result.steps,
            "valid_accuracy": result.valid_accuracy,
            "test_accuracy": result.test_accuracy,
            "valid_loss_nats": result.valid_loss_nats,
            "test_loss_nats": result.test_loss_nats,
        }
        for result in Store(out, create=False).results()
    }
    return {
        "status": "done",
        "wall_seconds": end.seconds,
        "seconds": told.get("wall_seconds", end.seconds),
        "seconds_are": "sweep.json's" if "wall_seconds" in told else "the whole command's",
        "sweep": told,
        "runs": len(table),
        "table": table,
    }


def fill_cache(bench: Bench) -> None:
    """The same sweep on all devices, not timed: runs that leave a pack make programs for fewer."""
    settings = [sweep_settings(bench, number, 0) for number in (1, bench.processes)]
    if all(bench.record.find("sweep", one) for one in settings):
        return
    out = bench.work / "sweep-cache"
    shutil.rmtree(out, ignore_errors=True)
    command = sweep_command(bench, bench.processes, bench.sweep_options)
    end = bench.child(command, "sweep-cache", OUT=out).wait(bench.args.child_seconds)
    assert end is not None
    if end.status != "done":
        bench.failed("sweep-cache", end)
    shutil.rmtree(out, ignore_errors=True)


def sweep_part(bench: Bench) -> None:
    """On n, on 1, and on n with a worker killed."""
    if not bench.args.cold:
        fill_cache(bench)
    for devices in (bench.processes, 1):
        sweep_row(bench, devices)
    if not bench.args.no_kill:
        sweep_row(bench, bench.processes, kill=True)
