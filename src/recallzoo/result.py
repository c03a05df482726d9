"""What is kept of a finished run, and whether what was stored still is one."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from recallzoo import schemas
from recallzoo.options import OptionValue

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
            "mixers": [{"name": str, "options": object, "source_sha256": str | None}],
        },
        "optimizer": {"learning_rate": float},
    },
    "state_size": {...: int},
    "provenance": {"commit": str | None, "device": str | None, "fallbacks": list},
}
"""What is read of a stored result. What is not named here is shown as it stands."""
_OPTIONAL = (
    *("seq_len", "num_pairs", "source_sha256"),
    *("diverged_step", "provenance", "commit", "device", "fallbacks"),
)


def mistake(content: Any) -> str | None:
    """What keeps a stored result, its metrics and rows left out, from being read as one, such as
    `config.seed is "0", where a whole number is wanted`; None if nothing does."""
    found = schemas.mistake(content, _RESULT, _OPTIONAL) or _mistaken_options(content)
    if found is None:
        unknown = (f"{name} is no field of a result" for name in content if name not in _RESULT)
        found = next(unknown, None)
    if found is None and content["config"]["optimizer"]["learning_rate"] <= 0:  # drawn as a log
        found = "config.optimizer.learning_rate is not above 0"
    return found


def _mistaken_options(content: Any) -> str | None:
    for number, one in enumerate(content["config"]["model"]["mixers"]):
        options = one["options"]
        is_good = isinstance(options, list) and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
            for pair in options
        )
        if not is_good:
            name = f"config.model.mixers[{number}].options"
            return schemas.wanted(name, options, "a list of names with their values is")
    return None
