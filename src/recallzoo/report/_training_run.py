"""One pretraining run as its page reads it: what it trains, and how far it has come.

A run that is damaged is refused, and named: it can be left out of a report. What is advised never
costs a checkpoint.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recallzoo.errors import StoreError, UserError
from recallzoo.result import PRETRAINING_RUN
from recallzoo.schemas import read_described
from recallzoo.train._pretrain_log import METRICS, SUMMARY, read_metrics

_BY_CUT = re.compile(r"valid_(ar_hit|other)_(\d+)_loss_nats")
_CONFIG = {
    "preset": str,
    "steps": int,
    "order": {"context": int, "global_batch": int, "seed": int | None},
    "data": {"corpus": str, "tokenizer_hash": str, "train_checksum": str | None},
    "optimizer": {"learning_rate": float},
    "precision": str | None,
}
_SUMMARY = {
    "parameters": int | None,
    "mfu": float | None,
    "device": str | None,
    "compile": str | None,
    "notes": (list, None),
    "provenance": ({}, None),
    "valid": ({"step": int | None}, None),
}
"""What is read of pretrain.json, and of summary.json."""
_OPTIONAL = ("seed", "train_checksum", "precision", "step", *_SUMMARY)


@dataclass(frozen=True)
class Training:
    """One run."""

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any] | None
    """None while the run is not finished."""

    @property
    def tokens_per_step(self) -> int:
        order = self.config["order"]
        return order["context"] * order["global_batch"]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss_nats" in line]

    @cached_property
    def looks(self) -> list[dict[str, Any]]:
        """At the validation split."""
        return [line for line in self.lines if "valid_loss_nats" in line]

    @cached_property
    def cuts(self) -> list[int]:
        """Most training occurrences of an AR hit's pair, ascending."""
        names = {name for line in self.looks for name in line}
        return sorted({int(found[2]) for name in names if (found := _BY_CUT.fullmatch(name))})

    @property
    def is_cut_short(self) -> bool:
        """Whether a finished run lacks the last of its lines."""
        if self.summary is None:
            return False
        last_look = (self.summary.get("valid") or {}).get("step")
        looked = self.looks[-1]["step"] if self.looks else None
        return self.steps[-1]["step"] < self.config["steps"] or last_look not in (None, looked)


def read_training(folder: Path, name: str) -> Training:
    """A run, finished or not. UserError for one without a step in its metrics yet, StoreError for
    one that is damaged."""
    path, remedy = folder / SUMMARY, _remedy(folder)
    config = read_described(folder / PRETRAINING_RUN, _CONFIG, remedy, _OPTIONAL)
    summary = read_described(path, _SUMMARY, remedy, _OPTIONAL) if path.exists() else None
    lines = read_metrics(folder, remedy=remedy)
    run = Training(name, config, lines, summary)
    if run.steps:
        return run
    if summary is None:
        raise UserError(f"{folder} has no step in its metrics yet. Train some first.")
    raise StoreError(
        f"{folder / METRICS} has no step, where {SUMMARY} says that the run is finished. {remedy}"
    )


def _remedy(folder: Path) -> str:
    return (
        f"Put it back as it was, or make the report without {folder}. Delete nothing: the "
        f"checkpoints in it may be whole."
    )
