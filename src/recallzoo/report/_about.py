"""What a reader has to know of the runs: how they were made, what went wrong, what was checked."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from recallzoo.errors import StoreError
from recallzoo.files import read_json
from recallzoo.report._entries import Entry
from recallzoo.result import Result
from recallzoo.store import Store

MOST_NOTES = 30
"""Notes of one kind that the page lists; it says how many more there are."""
STATUSES = {
    "solved": "reached the stop accuracy on validation",
    "finished": "used the whole budget",
    "group_solved": "stopped because another learning rate had solved the task",
    "diverged": "loss became NaN or infinite",
}


def how_made(results: list[Result], commands: list[str]) -> list[tuple[str, list[str]]]:
    """(what, values) with the number of runs behind each value where there are several."""
    facts = {
        "recallzoo": "recallzoo",
        "commit": "commit",
        "PyTorch": "torch",
        "Triton": "triton",
        "flash-linear-attention": "flash-linear-attention",
        "Python": "python",
        "platform": "platform",
        "device": "device",
        "compiled": "compiled",
        "why not compiled": "not_compiled",
        "runs trained together": "pack_size",
    }
    rows = [("command", commands)] if commands else []
    rows.append(("runs", [f"{len(results):,}: {_statuses(results)}"]))
    rows += [
        (title, values)
        for title, name in facts.items()
        if (values := counted(_words(r.provenance.get(name)) for r in results))
    ]
    tasks = (
        f"{s['task']['task']} version {s['task']['task_version']}"
        for r in results
        for s in _first_of_each_task(r)
    )
    rows.append(("tasks", sorted(set(tasks))))
    rows.append(("seeds of the runs", [_listed({r.config["seed"] for r in results})]))
    rows.append(("seeds of the data", [_listed({r.config["data"]["seed"] for r in results})]))
    rows.append(("arithmetic", counted(r.config["precision"] for r in results)))
    seconds = sum(result.train_seconds for result in results)
    rows.append(("training time of all runs", [_duration(seconds)]))
    return rows


def _first_of_each_task(result: Result) -> list[dict[str, Any]]:
    data = result.config["data"]
    return [segment for split in ("train", "valid", "test") for segment in data[split]]


def notes(found: list[Entry], missing: dict[str, tuple[int, int]]) -> list[str]:
    """Divergence, fallbacks, runs stopped early or missing: what changes how to read the page.
    `missing` as `Runs.missing` gives it."""
    lines = []
    if missing:
        num_runs = sum(left for left, _ in missing.values())
        lines.append(
            f"{num_runs} runs of these recipes are not finished. Run the same recallzoo run "
            f"command again to finish them. A cell that lacks some may choose another learning "
            f"rate once it has them."
        )
        lines += _shortened(
            [
                f"not finished: {left} of {of} runs of {cell}"
                for cell, (left, of) in missing.items()
            ],
            "planned.json in the folder has every one.",
        )
    diverged: Counter[tuple[str, float]] = Counter()
    tried: Counter[tuple[str, float]] = Counter()
    fallbacks: Counter[str] = Counter()
    num_stopped = 0
    for entry in found:
        for result in entry.cell.results:
            key = (entry.series, result.config["optimizer"]["learning_rate"])
            tried[key] += 1
            diverged[key] += result.status == "diverged"
            num_stopped += result.status == "group_solved"
            fallbacks.update(map(str, result.provenance.get("fallbacks", ())))
    if num_stopped:
        lines.append(
            f"{num_stopped} runs stopped when another learning rate had solved their task; their "
            f"accuracy is a lower bound."
        )
    lines += _shortened(
        [
            f"{series} diverged at learning rate {rate:g} in {count} of {tried[series, rate]} runs."
            for (series, rate), count in sorted(diverged.items())
            if count
        ],
        "The status column of the table of all runs has every one.",
    )
    lines += _shortened(
        [f"{fallback} ({count} runs)" for fallback, count in sorted(fallbacks.items())],
        "The table of all runs has every one.",
    )
    return lines


def contracts(store: Store) -> list[dict[str, Any]]:
    """The verdicts on users' own mixers that `recallzoo run --mixer` left in the folder.
    StoreError for one that is damaged."""
    found = []
    for path in sorted((store.folder / "contracts").glob("*.json")):
        content = read_json(path)
        try:
            found.append(
                {
                    "mixer": str(content["mixer"]["name"]),
                    "passed": bool(content["passed"]),
                    "summary": str(content["summary"]),
                    "sizes": f"checked for width {content['d_model']}, {content['seq_len']} tokens",
                }
            )
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is no contract report (it lacks {error}). Delete it; recallzoo run "
                f"--mixer writes it anew."
            ) from error
    return found


def runs_table(found: list[Entry]) -> dict[str, Any]:
    """One row a run, for the page's table."""
    columns: list[dict[str, Any]] = [
        {"title": "model", "kind": "text", "choose": True},
        {"title": "task", "kind": "text", "choose": True},
        {"title": "width", "kind": "int", "choose": True},
        {"title": "learning rate", "kind": "rate", "choose": True},
        {"title": "seed", "kind": "int"},
        {"title": "status", "kind": "text", "choose": True},
        {"title": "test accuracy", "kind": "accuracy"},
        {"title": "validation accuracy", "kind": "accuracy"},
        {"title": "test loss, nats", "kind": "loss"},
        {"title": "steps", "kind": "int"},
        {"title": "epochs", "kind": "int"},
        {"title": "parameters", "kind": "int"},
        {"title": "state, elements", "kind": "int"},
        {"title": "seconds", "kind": "seconds"},
        {"title": "device", "kind": "text"},
        {"title": "fallbacks", "kind": "text"},
        {"title": "run", "kind": "hash"},
    ]
    varying = _varying(found)
    columns[6:6] = [{"title": name.rpartition(".")[2], "kind": "text"} for name in varying]
    rows = []
    for entry in found:
        options = [_words(entry.cell.config.get(name)) for name in varying]
        for result in sorted(entry.cell.results, key=lambda r: (_rate(r), r.config["seed"])):
            status = result.status.replace("_", " ")
            if result.status == "diverged" and result.diverged_step is not None:
                status += f" at step {result.diverged_step}"
            rows.append(
                [
                    entry.series,
                    entry.panel,
                    entry.width,
                    _rate(result),
                    result.config["seed"],
                    status,
                    *options,
                    result.test_accuracy,
                    result.valid_accuracy,
                    result.test_loss_nats,
                    result.steps,
                    result.epochs,
                    result.num_parameters,
                    sum(result.state_size.values()) if result.state_size else None,
                    round(result.train_seconds, 2),
                    _words(result.provenance.get("device")) or None,
                    "; ".join(map(str, result.provenance.get("fallbacks", ()))) or None,
                    result.hash,
                ]
            )
    return {"columns": columns, "rows": rows}


def _varying(found: list[Entry]) -> list[str]:
    """Options in which some cells differ and that no other column shows."""
    shown = ("model.d_model", "model.mixers")
    values: dict[str, set[str]] = defaultdict(set)
    names = {name for entry in found for name in entry.cell.config}
    for entry in found:
        for name in names:
            values[name].add(json.dumps(entry.cell.config.get(name)))
    return sorted(
        name
        for name in names
        if len(values[name]) > 1 and not name.startswith("data.") and name not in shown
    )


def _rate(result: Result) -> float:
    return result.config["optimizer"]["learning_rate"]


def _statuses(results: Iterable[Result]) -> str:
    counts = Counter(result.status for result in results)
    return "; ".join(
        f"{counts[status]:,} {status.replace('_', ' ')} ({meaning})"
        for status, meaning in STATUSES.items()
        if counts[status]
    )


def counted(values: Iterable[str]) -> list[str]:
    """Each value with the number of runs behind it, where there are several values."""
    counts = Counter(value for value in values if value)
    if len(counts) == 1:
        return list(counts)
    return [f"{value} ({count} runs)" for value, count in sorted(counts.items())]


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _listed(numbers: set[int]) -> str:
    ordered = [str(number) for number in sorted(numbers)]
    more = f", and {len(ordered) - 20} more" if len(ordered) > 20 else ""
    return ", ".join(ordered[:20]) + more


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _shortened(lines: list[str], where: str) -> list[str]:
    if len(lines) <= MOST_NOTES:
        return lines
    return [*lines[:MOST_NOTES], f"And {len(lines) - MOST_NOTES} more like the last. {where}"]
