"""Pretraining on 1 and on n GPUs, and with a worker killed: two parts of `several_gpus.py`."""

import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
from several_gpus_bench import UNTIMED_STEPS, Bench
from several_gpus_record import Row

from recallzoo.files import read_json
from recallzoo.text import open_data
from recallzoo.train._large_checkpoint import finished_steps
from recallzoo.train._pretrain_log import read_metrics


def pretrain_settings(bench: Bench, preset: str, parallel: str, processes: int) -> dict[str, Any]:
    """What names a pretraining run in the record."""
    args = bench.args
    return {
        "preset": preset,
        "parallel": parallel,
        "processes": processes,
        "device": bench.device,
        "data": "synthetic" if args.data is None else open_data(args.data).name,
        **{
            name: getattr(args, name)
            for name in (
                "context",
                "global_batch",
                "micro_batch",
                "steps",
                "warmup",
                "learning_rate",
                "precision",
                "compile",
                "checkpoint_activations",
                "d_model",
                "num_layers",
            )
        },
        "vocab_size": args.vocab_size if args.data is None else None,
    }


def pretrain_command(
    settings: dict[str, Any], micro_batch: int, device: str, *extra: str
) -> list[str]:
    """The command line of one run, DATA and OUT in the place of its folders."""
    words = ["-m", "recallzoo", "pretrain", settings["preset"], "--data", "DATA", "--out", "OUT"]
    if settings["processes"] > 1:
        number = str(settings["processes"])
        start = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        start += ["--nproc-per-node", number]
        words = [*start, *words, "--parallel", settings["parallel"]]
    names = ("context", "global_batch", "steps", "warmup", "learning_rate", "precision", "compile")
    for name in names:
        words += [f"--{name.replace('_', '-')}", str(settings[name])]
    words += ["--micro-batch", str(micro_batch), "--device", device]
    for name in ("d_model", "num_layers"):
        if settings[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(settings[name])]
    if settings["checkpoint_activations"]:
        words += ["--checkpoint-activations"]
    words += ["--valid-every", "0", "--no-export", "--no-verify-data", "--repeat-data"]
    return ["python", *words, *extra]


def used_micro_batch(bench: Bench, preset: str) -> int:
    """That of the run in one process, which halves it until memory suffices; n cannot."""
    base = bench.record.find("pretrain", pretrain_settings(bench, preset, "one process", 1))
    return base["micro_batch_used"] if base else bench.args.micro_batch


def pretrain_row(
    bench: Bench,
    preset: str,
    parallel: str,
    processes: int,
    gpu: int | None = None,
    beside: str | None = None,
) -> None:
    """Measure one run, on a GPU of its own if one is given, and keep it."""
    settings = pretrain_settings(bench, preset, parallel, processes)
    if bench.record.find("pretrain", settings):
        return
    name = f"{preset}-{parallel.replace(' ', '-')}-{processes}"
    out = bench.work / name
    shutil.rmtree(out, ignore_errors=True)
    micro_batch = used_micro_batch(bench, preset)
    command = pretrain_command(settings, micro_batch, bench.args.device, "--save-minutes", "1000")
    changed = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    end = bench.child(command, name, changed, OUT=out, DATA=bench.data()).wait(
        bench.args.child_seconds
    )
    assert end is not None
    row: Row = {
        "settings": settings,
        "command": " ".join(command),
        "beside": beside,
    }
    row |= measured(out, end) if end.status == "done" else bench.failed(name, end)
    bench.keep("pretrain", row)
    shutil.rmtree(out, ignore_errors=True)  # a checkpoint has 12 bytes a weight


def measured(out: Path, end: children.End) -> Row:
    """The numbers of a finished run."""
    summary = read_json(out / "summary.json")
    lines = [line for line in read_metrics(out) if "loss_nats" in line]
    timed = [line["seconds"] for line in lines[UNTIMED_STEPS:]] or [lines[-1]["seconds"]]
    tokens = summary["tokens"] / summary["steps"]
    return {
        "status": "done",
        "wall_seconds": end.seconds,
        "parameters": summary["parameters"],
        "tokens_per_second": tokens / statistics.median(timed),
        "mean_tokens_per_second": tokens * len(timed) / sum(timed),
        "mfu": summary["mfu"],
        "peak_memory_gib": summary["peak_memory_gib_by_process"],
        "micro_batch_used": summary["micro_batch"],
        "compile": summary["compile"],
        "notes": summary["notes"],
        "step_seconds": [line["seconds"] for line in lines],
        "losses": [line["loss_nats"] for line in lines],
    }


def pretrain_part(bench: Bench) -> None:
    """Every preset in one process, then in n."""
    args, record = bench.args, bench.record
    alone = [("one process", 1, preset) for preset in args.presets]
    if args.concurrent and not bench.on_cpu:
        waiting = [
            one
            for one in alone
            if not record.find("pretrain", pretrain_settings(bench, one[2], *one[:2]))
        ]
        at_once = min(bench.processes, len(waiting))
        bench.data()  # once, before several threads would make it
        for first in range(0, len(waiting), max(1, at_once)):
            group = waiting[first : first + at_once]
            with ThreadPoolExecutor(len(group)) as pool:
                futures = []
                for gpu, (parallel, processes, preset) in enumerate(group):
                    others = [one[2] for one in group if one[2] != preset]
                    beside = f"at once, on other GPUs: {', '.join(others)}" if others else None
                    futures.append(
                        pool.submit(pretrain_row, bench, preset, parallel, processes, gpu, beside)
                    )
                for future in futures:
                    future.result()
    for parallel, processes, preset in alone:
        pretrain_row(bench, preset, parallel, processes, None if bench.on_cpu else 0)
    for preset in args.presets:
        for parallel in args.parallel:
            pretrain_row(bench, preset, parallel, bench.processes)


def kill_row(bench: Bench, preset: str, parallel: str) -> None:
    """Kill the last of n workers after a checkpoint, go on, and keep the losses."""
    save_every = max(1, bench.args.steps // 4)
    plain = pretrain_settings(bench, preset, parallel, bench.processes)
    settings = {**plain, "save_every": save_every}
    if bench.record.find("kill", settings):
        return
    pretrain_row(bench, preset, parallel, bench.processes)  # what it is compared with
    name = f"kill-{preset}-{parallel}-{bench.processes}"
    out = bench.work / name
    shutil.rmtree(out, ignore_errors=True)
    extra = ("--save-every", str(save_every))
    command = pretrain_command(plain, used_micro_batch(bench, preset), bench.args.device, *extra)
    row: Row = {"settings": settings, "command": " ".join(command)}

    def trained() -> int:
        return sum("loss_nats" in line for line in read_metrics(out))

    def is_time() -> bool:
        saved = finished_steps(out / "checkpoints")
        return bool(saved) and trained() > saved[-1]

    torchrun = bench.child(command, name, OUT=out, DATA=bench.data())
    end = torchrun.wait(bench.args.child_seconds, until=is_time)
    if end is None:
        worker = children.torchrun_worker(torchrun.process.pid, bench.processes - 1)
        killed = worker is not None and children.kill(worker)
        at, began = time.monotonic(), trained()
        end = torchrun.wait(bench.args.child_seconds)
        assert end is not None
        row["killed"] = {
            "rank": bench.processes - 1,
            "was_there": killed,
            "after_step": began,
            "last_checkpoint": finished_steps(out / "checkpoints")[-1],
            "exit_code_of_torchrun": end.exit_code,
            "seconds_until_torchrun_ended": time.monotonic() - at,
        }
        if killed and end.status == "failed":
            again = bench.child(command, f"{name}-again", OUT=out, DATA=bench.data())
            end = again.wait(bench.args.child_seconds)
            assert end is not None
            if end.status == "done":
                row |= measured(out, end)
    if "losses" not in row:
        row |= bench.failed(name, end)
        row["status"] = "ended early" if row["status"] == "done" else row["status"]
    bench.keep("kill", row)
    shutil.rmtree(out, ignore_errors=True)
