"""What is kept of a finished run."""

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["solved", "finished", "diverged", "group_solved"]


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
    rows: list[SliceRow] = field(default_factory=list)
