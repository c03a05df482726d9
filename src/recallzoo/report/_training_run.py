"""One pretraining run as its page reads it: what it trains, and how far it has come.

A run that is damaged is refused, and named: it can be left out of a report. What is advised never
costs a checkpoint.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recallzoo.errors import StoreError, UserError
from recallzoo.options import describe_type, fits
from recallzoo.result import PRETRAINING_RUN
from recallzoo.train._pretrain_log import METRICS, SUMMARY, is_finite, read_metrics

_BY_CUT = re.compile(r"valid_(ar_hit|other)_(\d+)_loss_nats")
_CONFIG = {
    "preset": str,
    "steps": int,
    "order.context": int,
    "order.global_batch": int,
    "data.corpus": str,
    "data.tokenizer_hash": str,
    "optimizer.learning_rate": float,
}
_MAY_LACK = {"order.seed": int, "data.train_checksum": str, "precision": str}
_OF_SUMMARY = {
    "parameters": int,
    "mfu": float,
    "device": str,
    "compile": str,
    "notes": list,
    "provenance": dict,
    "valid": dict,
    "valid.step": int,
}
"""What is read of pretrain.json, and of summary.json, where all may be absent or null."""
_WORDS = {float: "a finite number", list: "a list", dict: "a group of names with values"}


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
    """A run, finished or not. UserError for one without a step in its metrics, or damaged."""
    config = _read(folder / PRETRAINING_RUN, _CONFIG, _MAY_LACK)
    path = folder / SUMMARY
    summary = _read(path, {}, _OF_SUMMARY) if path.exists() else None
    try:
        lines = read_metrics(folder, remedy=_remedy(folder))
    except StoreError as error:
        raise UserError(str(error)) from error
    run = Training(name, config, lines, summary)
    if run.steps:
        return run
    if summary is None:
        raise UserError(f"{folder} has no step in its metrics yet. Train some first.")
    raise _refused(folder / METRICS, f"has no step, where {SUMMARY} says that the run is finished")


def _read(path: Path, wanted: dict[str, type], may_lack: dict[str, type]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"is damaged: it is not valid JSON ({error})") from error
    wrong = _mistake(content, wanted, may_lack)
    if wrong is not None:
        raise _refused(path, f"is damaged: {wrong}")
    return content


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"{path} {why}. {_remedy(path.parent)}")


def _remedy(folder: Path) -> str:
    return (
        f"Put it back as it was, or make the report without {folder}. Delete nothing: the "
        f"checkpoints in it may be whole."
    )


def _mistake(content: Any, wanted: dict[str, type], may_lack: dict[str, type]) -> str | None:
    if not isinstance(content, dict):
        return f"it is {_short(content)}, where names with values are wanted"
    for name, kind in {**wanted, **may_lack}.items():
        value = _at(content, name)
        if value is None and name in wanted:
            return f"{name} is missing"
        if value is not None and not (fits(value, kind) and is_finite(value)):
            words = _WORDS.get(kind) or describe_type(kind)
            return f"{name} is {_short(value)}, where {words} is wanted"
    return None


def _at(content: dict[str, Any], name: str) -> Any:
    value: Any = content
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
