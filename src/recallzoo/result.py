"""What is kept of a finished run, and whether what was stored still is one."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from recallzoo.options import OptionValue, describe_type, fits

Status = Literal["solved", "finished", "diverged", "group_solved"]
PRETRAINING_RUN = "pretrain.json"
"""What the folder of a `recallzoo pretrain` run holds from its start; its model is in `model/`."""


@dataclass(frozen=True, kw_only=True)
class SliceRow:
    """Test accuracy on the queries whose slice `slice` has value `value`."""

    slice: str
    value: int
    correct: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run."""

    hash: str
    group: str
    """Hash of the run without its learning rate."""
    label: str
    config: dict[str, Any]
    status: Status
    """solved: reached the stop accuracy on validation; finished: used its whole budget;
    diverged: loss became NaN or infinite; group_solved: another learning rate solved it."""
    steps: int
    epochs: int
    train_loss_nats: float | None
    """Mean over the last interval between evaluations; None if not finite."""
    valid_loss_nats: float | None
    valid_accuracy: float
    test_loss_nats: float | None
    test_accuracy: float
    num_parameters: int
    state_size: dict[str, int]
    """Elements carried while decoding after the longest sequence, by kind; empty if unknown."""
    train_seconds: float
    """Wall time of its pack up to the end of this run, divided by the runs in the pack."""
    diverged_step: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, commit, device, pack size, and every fallback taken."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """One line for each look at the validation set; what is stored has at least one."""
    rows: list[SliceRow] = field(default_factory=list)


_PAIRS = "a list of names with their values"
_SEGMENTS = [
    {
        "num_examples": int,
        "task": {
            "task": str,
            "task_version": int,
            "seq_len": int | None,
            "num_pairs": int | None,
            ...: OptionValue,
        },
    }
]
_RESULT: dict[str, Any] = {
    **{f.name: f.type for f in dataclasses.fields(Result) if f.name not in ("metrics", "rows")},
    "config": {
        "seed": int,
        "precision": str,
        "data": {"seed": int, "train": _SEGMENTS, "valid": _SEGMENTS, "test": _SEGMENTS},
        "model": {
            "d_model": int,
            "mixers": [{"name": str, "options": _PAIRS, "source_sha256": str | None}],
        },
        "optimizer": {"learning_rate": float},
    },
    "state_size": {...: int},
    "provenance": {"commit": str | None, "device": str | None, "fallbacks": list},
}
"""What is read of a stored result: names with types, ... for all other names, lists of at least
one. What is not named here is shown as it stands."""
_OPTIONAL = (
    *("seq_len", "num_pairs", "source_sha256"),
    *("diverged_step", "provenance", "commit", "device", "fallbacks"),
)


def mistake(content: Any) -> str | None:
    """What keeps a stored result, its metrics and rows left out, from being read as one, such as
    `config.seed is "0", where a whole number is wanted`; None if nothing does."""
    found = next(_mistakes(content, _RESULT, ""), None)
    if found is None:
        unknown = (f"{name} is no field of a result" for name in content if name not in _RESULT)
        found = next(unknown, None)
    if found is None and content["config"]["optimizer"]["learning_rate"] <= 0:  # drawn as a log
        found = "config.optimizer.learning_rate is not above 0"
    return found


def _mistakes(value: Any, wanted: Any, name: str) -> Iterator[str]:
    called = name or "it"
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield f"{called} is {_short(value)}, where names with values are wanted"
            return
        others = [key for key in value if key not in wanted] if ... in wanted else []
        for key in (*(key for key in wanted if key is not ...), *others):
            inner = f"{name}.{key}".lstrip(".")
            if key in value:
                yield from _mistakes(value[key], wanted.get(key, wanted.get(...)), inner)
            elif key not in _OPTIONAL:
                yield f"{inner} is missing"
    elif isinstance(wanted, list):
        if not isinstance(value, list) or not value:
            yield f"{called} is {_short(value)}, where a list of at least one is wanted"
            return
        for number, one in enumerate(value):
            yield from _mistakes(one, wanted[0], f"{name}[{number}]")
    elif wanted == _PAIRS:
        good = isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in value
        )
        if not good:
            yield f"{called} is {_short(value)}, where {_PAIRS} is wanted"
    elif not fits(value, wanted):
        yield f"{called} is {_short(value)}, where {describe_type(wanted)} is wanted"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{called} is {value}, where a finite number is wanted"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
