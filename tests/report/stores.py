"""Results made up for the report's tests: nothing is trained."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recallzoo.result import Result, SliceRow, Status
from recallzoo.store import Store

HOSTILE = "x.py:</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
"""A label that a careless page would run."""


def result(
    mixer: str = "attention",
    *,
    label: str | None = None,
    task: str = "mqar",
    seq_len: int = 64,
    num_pairs: int = 4,
    vocab_size: int = 8192,
    width: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    accuracy: float = 0.5,
    valid_accuracy: float | None = None,
    status: Status = "finished",
    num_layers: int = 2,
    num_examples: int = 1000,
    state_size: dict[str, int] | None = None,
    fallbacks: Iterable[str] = (),
    rows: list[SliceRow] | None = None,
    kernel_size: int = -1,
) -> Result:
    """One finished run with these properties; its hash follows from its configuration. BaseConv
    alone has a kernel_size."""
    options = [["kernel_size", kernel_size]] if mixer == "base_conv" else []
    segment = {
        "task": {
            "task": task,
            "task_version": 1,
            "vocab_size": vocab_size,
            "seq_len": seq_len,
            "num_pairs": num_pairs,
            "power": 0.01,
            "num_passes": 1,
            "filler": "zero",
        },
        "num_examples": num_examples,
    }
    config: dict[str, Any] = {
        "run_version": 1,
        "data": {"train": [segment], "valid": [segment], "test": [segment], "seed": 0},
        "model": {
            "mixers": [{"name": mixer, "options": options, "source_sha256": None}],
            "d_model": width,
            "num_layers": num_layers,
            "state_mixer": "identity",
        },
        "optimizer": {"learning_rate": learning_rate, "weight_decay": 0.1},
        "budget": {"num_epochs": 4, "batch_size": 64},
        "seed": seed,
        "precision": "fp32",
    }
    digest = hashlib.sha256(json.dumps([config, label]).encode()).hexdigest()[:16]
    return Result(
        hash=digest,
        group=digest,
        label=mixer if label is None else label,
        config=config,
        status=status,
        steps=100,
        epochs=4,
        train_loss_nats=None if status == "diverged" else 1.0,
        valid_loss_nats=None if status == "diverged" else 1.1,
        valid_accuracy=accuracy if valid_accuracy is None else valid_accuracy,
        test_loss_nats=None if status == "diverged" else 1.2,
        test_accuracy=accuracy,
        num_parameters=1000 * width,
        state_size={"kv": width * seq_len} if state_size is None else state_size,
        train_seconds=1.5,
        diverged_step=17 if status == "diverged" else None,
        provenance={
            "recallzoo": "0.1.0",
            "torch": "2.13.0",
            "commit": "0123abc",
            "device": "CPU, 1 threads",
            "pack_size": 2,
            "compiled": False,
            "fallbacks": list(fallbacks),
        },
        metrics=[{"epoch": 4, "step": 100, "valid_accuracy": accuracy}],
        rows=distances(accuracy, seq_len) if rows is None else rows,
    )


def distances(accuracy: float, seq_len: int) -> list[SliceRow]:
    """Accuracy that falls with the distance, over more distances than a chart has room for."""
    return [
        SliceRow(slice="distance", value=d, correct=round(100 * accuracy**0.5 / d**0.1), total=100)
        for d in range(2, seq_len, 2)
    ]


def store_of(folder: Path, results: Iterable[Result]) -> Store:
    """A results folder that holds these."""
    store = Store(folder)
    for one in results:
        store.write(one)
    return store


def figure2(
    widths: Iterable[int] = (64, 128, 256, 512),
    seeds: Iterable[int] = (0, 1),
    rates: Iterable[float] = (1e-4, 4.6e-4, 2.2e-3, 1e-2),
) -> list[Result]:
    """A grid of the shape of the paper's Figure 2."""
    strength = {"attention": 4.0, "base_conv": 0.8, "h3": 1.0, "hyena": 0.6, "rwkv4": 0.7}
    found = []
    for mixer, power in strength.items():
        for seq_len, num_pairs in ((64, 4), (128, 8), (256, 16), (512, 64)):
            for width in widths:
                for number, rate in enumerate(rates):
                    for seed in seeds:
                        reach = min(1.0, power * width / seq_len * (0.55, 1, 0.9, 0.2)[number % 4])
                        diverges = mixer == "hyena" and rate == 1e-2 and width == 512
                        found.append(
                            result(
                                mixer,
                                seq_len=seq_len,
                                num_pairs=num_pairs,
                                width=width,
                                learning_rate=rate,
                                seed=seed,
                                accuracy=0.0 if diverges else max(0.0, reach - 0.04 * seed),
                                status="diverged" if diverges else "finished",
                                state_size={"kv": (1 + 7 * (mixer == "attention")) * width * 64},
                            )
                        )
    return found
