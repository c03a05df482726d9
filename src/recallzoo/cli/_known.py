"""Runs whose results stand in tables of runs, and need no training."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recallzoo.cells import Cell, data_options
from recallzoo.errors import UserError
from recallzoo.files import is_vacant
from recallzoo.result import Result
from recallzoo.store import Store, flatten

if TYPE_CHECKING:
    from recallzoo.run import Run

MOST_NAMED = 5
"""Options, or values of one, in a message."""
LONGEST_SHOWN = 40
"""Value of an option in a message; of a list of mixers the option's name is enough."""


@dataclass
class Known:
    """What tables know of the runs that are asked for."""

    results: dict[str, Result] = field(default_factory=dict)
    """By hash, of the runs that are not trained for it."""
    tables: list[Path] = field(default_factory=list)
    """Those that these results are from."""
    counts: list[str] = field(default_factory=list)
    """How many runs stand in which table."""
    notes: list[str] = field(default_factory=list)
    """Why runs are trained that may have been thought known."""
    remarks: list[str] = field(default_factory=list)
    """What the tables used lack."""


def find_known(runs: "list[Run]", tables: Iterable[Path], folder: Path) -> Known:
    """The results of `runs` that stand in `tables` and not in a results folder, or what is to be
    one. Of several tables the first counts.

    Raises UserError for what is no table of runs, is damaged, or is the folder's own.
    """
    from recallzoo.report import runs_of_table  # which imports what draws charts

    store = None if is_vacant(folder) else Store(folder)
    by_hash = {run.hash: run for run in runs}
    known, home, remarks = Known(), dict[str, Path](), dict[Path, list[str]]()
    for path in tables:
        _refuse(path, folder)
        table = runs_of_table(path, or_folder=False)
        found = {
            r.hash: _checked(r, by_hash[r.hash], path) for r in table.results if r.hash in by_hash
        }
        if not found:
            known.notes.append(
                f"none of the runs asked for stands in {path}. {_why(runs, table.results)}"
            )
            continue
        new = {h: r for h, r in found.items() if h not in known.results and not _has(store, h)}
        elsewhere = len(found) - len(new)
        also = f", {elsewhere} of them in {folder} or a table named before too" if elsewhere else ""
        known.counts.append(f"{len(found)} of {len(runs)} runs stand in {path}{also}")
        known.results |= new
        home |= dict.fromkeys(new, path)
        remarks[path] = table.remarks
    apart = _apart(runs, known.results, store)
    for run_hash in apart:
        del known.results[run_hash]
    if apart:
        known.notes.append(
            f"{len(apart)} runs that stand in a table are trained all the same: they stop together "
            f"with the other learning rates of their group (stop_group), and the group does not "
            f"stand there whole and as it would have ended."
        )
    known.tables = list(dict.fromkeys(home[run_hash] for run_hash in known.results))
    known.remarks = [remark for path in known.tables for remark in remarks[path]]
    return known


def _has(store: Store | None, run_hash: str) -> bool:
    return store is not None and store.has(run_hash)


def _refuse(path: Path, folder: Path) -> None:
    if path.is_dir():
        raise UserError(
            f"--known {path} is a folder; a table of runs is wanted. Give {path / 'table.parquet'}."
        )
    if path.resolve() == (folder / "table.parquet").resolve():
        raise UserError(
            f"--known {path} is the table of {folder} itself, which is made anew from the runs in "
            f"that folder. Copy it to another place and give the copy, or use another folder."
        )


def _checked(result: Result, run: "Run", path: Path) -> Result:
    """With the configuration of its run: a table cannot tell an option that is None from one that
    there is not. UserError where they differ otherwise."""
    wanted, given = flatten(run.config), flatten(result.config)
    for name in dict.fromkeys((*wanted, *given)):
        if wanted.get(name) != given.get(name):
            raise UserError(
                f"{path}, run {run.hash}: {name} is {given.get(name)!r:.40}, where the run of this "
                f"hash has {wanted.get(name)!r:.40}. The table was damaged or changed. Give it as "
                f"recallzoo run wrote it."
            )
    return dataclasses.replace(result, config=run.config)


def _apart(runs: "list[Run]", known: dict[str, Result], store: Store | None) -> list[str]:
    """Of the known runs, those that stop as a group of which some are still to be trained, or that
    ended in another company: beside these they might have stopped elsewhere."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        if run.budget.stop_group:
            groups.setdefault(run.group_key, []).append(run.hash)
    found = []
    for group in groups.values():
        of_tables = [h for h in group if h in known]
        of_store = [h for h in group if h not in known and store is not None and store.has(h)]
        if not of_tables:
            continue
        is_whole = len(of_tables) + len(of_store) == len(group)
        results = [known[h] for h in of_tables]
        if store is not None:
            results += [store.read(h) for h in of_store]
        if not (is_whole and _ended_as_one(results)):
            found += of_tables
    return found


def _ended_as_one(group: list[Result]) -> bool:
    """Whether a group that trained together could have ended so: all at once, but for those that
    had diverged by then, and early only where one of them had solved the task."""
    ends = [result.epochs for result in group if result.status != "diverged"]
    statuses = {result.status for result in group}
    return all(result.epochs <= end for result in group for end in ends) and (
        "group_solved" not in statuses or "solved" in statuses
    )


def _why(runs: "list[Run]", results: list[Result]) -> str:
    """The likely reason why none of `runs` is among `results`: options that have no value in
    common."""
    asked, there = (
        _values(flatten(config) for config in configs)
        for configs in ((run.config for run in runs), (result.config for result in results))
    )
    differing = [name for name in asked if not asked[name] & there.get(name, {"None"})]
    if "run_version" in differing:
        return (
            f"Its runs have run_version {_text(there.get('run_version', {'None'}))}, those asked "
            f"for {_text(asked['run_version'])}: such runs train differently, so that none counts."
        )
    if not differing:
        return "Each option has values in common with theirs, but in other combinations."
    words = [_in_words(name, there.get(name, {"None"}), asked[name]) for name in differing]
    more = f" and {len(words) - MOST_NAMED} more" * (len(words) > MOST_NAMED)
    return f"Its runs have other options: {'; '.join(words[:MOST_NAMED])}{more}."


def _in_words(name: str, there: set[str], asked: set[str]) -> str:
    if max(map(len, there | asked)) > LONGEST_SHOWN:
        return name
    return f"{name} {_text(there)} (asked for: {_text(asked)})"


def _values(configs: Iterable[dict[str, Any]]) -> dict[str, set[str]]:
    """By option, the values that it has in flattened configurations."""
    values: dict[str, set[str]] = {}
    for config in configs:
        options = {n: v for n, v in config.items() if not n.startswith("data.")}
        for name, value in {**options, **data_options(Cell("", config, ()))}.items():
            values.setdefault(name, set()).add(str(value))
    return values


def _text(values: set[str]) -> str:
    shown = sorted(values, key=lambda value: (len(value), value))[:MOST_NAMED]
    return ", ".join(shown) + f" and {len(values) - MOST_NAMED} more" * (len(values) > MOST_NAMED)
