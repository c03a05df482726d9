"""The record of `several_gpus.py`: rows of measurements, and what follows from them together.

    {"about": {...}, "pretrain": [row, ...], "kill": [row, ...], "sweep": [row, ...]}

A row has `settings`, which name it, and `status`. Efficiencies and differences are derived anew
from all rows whenever one is added, so rows may come from several calls.

    efficiency = rate of n / (n rate of 1) = seconds of 1 / (n seconds of n)
"""

import threading
from pathlib import Path
from typing import Any

from recallzoo.files import read_json, write_json

PARTS = ("pretrain", "kill", "sweep")
Row = dict[str, Any]


class Record:
    """The rows of a file, kept after each measurement."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self._lock = threading.Lock()
        content = read_json(path) if path.exists() else {}
        self.rows: dict[str, list[Row]] = {part: content.get(part, []) for part in PARTS}
        before = content.get("about", {}).get("commands", [])
        commands = [*before, *(one for one in about["commands"] if one not in before)]
        self._about = {**about, "commands": commands}

    def find(self, part: str, settings: dict[str, Any]) -> Row | None:
        """The finished row of these settings."""
        for row in self.rows[part]:
            if row["settings"] == settings and row["status"] == "done":
                return row
        return None

    def keep(self, part: str, row: Row) -> None:
        """Add a row, in place of one of equal settings, and write the file."""
        with self._lock:
            others = [one for one in self.rows[part] if one["settings"] != row["settings"]]
            self.rows[part] = [*others, row]
            derive(self.rows)
            write_json(self._path, {"about": self._about, **self.rows})


def derive(rows: dict[str, list[Row]]) -> None:
    """Efficiencies and differences, wherever both sides are there."""
    for row in rows["pretrain"]:
        base = _with(rows["pretrain"], row, {"processes": 1, "parallel": "one process"})
        if base is not None and row["status"] == "done" and base is not row:
            rates = row["tokens_per_second"], base["tokens_per_second"]
            row["efficiency"] = efficiency(*rates, row["settings"]["processes"])
            row["against_one_process"] = loss_difference(row["losses"], base["losses"])
    for row in rows["kill"]:
        base = _with(rows["pretrain"], row, {})
        if base is not None and row["status"] == "done":
            row["against_undisturbed"] = loss_difference(row["losses"], base["losses"])
    for row in rows["sweep"]:
        undisturbed = {"killed_workers": 0}
        base = _with(rows["sweep"], row, {"devices": 1, **undisturbed})
        if row["settings"]["killed_workers"]:
            base = _with(rows["sweep"], row, undisturbed)
        if base is None or row["status"] != "done" or base is row:
            continue
        row["table_against"] = {
            "devices": base["settings"]["devices"],
            **table_difference(row["table"], base["table"]),
        }
        if not row["settings"]["killed_workers"]:
            number = row["settings"]["devices"]
            row["efficiency"] = base["seconds"] / (number * row["seconds"])


def efficiency(rate: float, rate_of_one: float, number: int) -> float:
    """Share of `number` times the rate of one that is reached."""
    return rate / (number * rate_of_one)


def loss_difference(losses: list[float], others: list[float]) -> dict[str, Any]:
    """How far two runs' losses are apart, step by step, in nats."""
    apart = [abs(a - b) for a, b in zip(losses, others, strict=False)]
    largest = max(apart, default=0.0)
    return {
        "steps": len(apart),
        "equal_number_of_steps": len(losses) == len(others),
        "largest_nats": largest,
        "largest_at_step": apart.index(largest) + 1 if apart else None,
        "first_step_nats": apart[0] if apart else None,
        "equal_steps": sum(one == 0 for one in apart),
    }


COLUMNS = ("valid_accuracy", "test_accuracy", "valid_loss_nats", "test_loss_nats")


def table_difference(table: dict[str, Row], other: dict[str, Row]) -> dict[str, Any]:
    """How far two result tables, hash -> columns, are apart."""
    both = sorted(table.keys() & other.keys())
    found: dict[str, Any] = {
        "runs": len(both),
        "runs_in_one_table_only": len(table.keys() ^ other.keys()),
        "runs_that_differ": sum(table[one] != other[one] for one in both),
        "runs_of_other_status_or_steps": sum(
            any(table[one][name] != other[one][name] for name in ("status", "steps"))
            for one in both
        ),
    }
    for name in COLUMNS:
        pairs = [(table[one][name], other[one][name]) for one in both]
        apart = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        found[f"largest_{name}"] = max(apart, default=0.0)
    return found


def _with(rows: list[Row], row: Row, changed: dict[str, Any]) -> Row | None:
    """The finished row whose settings are this one's but for `changed`."""
    own = {"save_every", "after_step", "checkpoint_seconds"}  # of kill tests alone
    wanted = {k: v for k, v in {**row["settings"], **changed}.items() if k not in own}
    for one in rows:
        settings = {k: v for k, v in one["settings"].items() if k not in own}
        if settings == wanted and one["status"] == "done":
            return one
    return None
