"""A small corpus and tiny runs on it."""

from pathlib import Path
from typing import Any

from recallzoo.text import PrepareOptions, prepare
from recallzoo.train._pretrain_log import read_metrics
from recallzoo.train._pretrain_options import PretrainOptions
from tests.text import corpora

TINY: dict[str, Any] = {
    "preset": "attention-70m",
    "d_model": 64,
    "num_layers": 1,
    "context": 16,
    "global_batch": 4,
    "steps": 6,
    "precision": "fp32",
    "valid_every": 3,
    "valid_contexts": 5,
    "export": False,
    "verify_data": False,
    "device": "cpu",
}


def small_data(folder: Path, vocab_size: int = 280, number: int = 60) -> Path:
    source = corpora.json_lines(folder.with_suffix(".jsonl"), corpora.documents(number))
    prepare(
        PrepareOptions(
            out=folder, sources=(str(source),), vocab_size=vocab_size, valid_fraction=0.2
        ),
        progress=False,
    )
    return folder


def options(data: Path, out: Path, **changed: Any) -> PretrainOptions:
    return PretrainOptions(**{**TINY, "data": data, "out": out, **changed})


def losses(out: Path) -> list[float]:
    return [line["loss_nats"] for line in read_metrics(out) if "loss_nats" in line]


def valid_losses(out: Path) -> list[float]:
    return [line["valid_loss_nats"] for line in read_metrics(out) if "valid_loss_nats" in line]
