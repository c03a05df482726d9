"""Where the runs of a report come from: results folders, tables of runs, or several of both.

A table is the `table.parquet` that `recallzoo run` keeps in its folder: one row a run, which is
small enough to publish. It has neither accuracy by slice nor the parts of a state, neither versions
nor fallbacks, nor what is left to train.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from recallzoo.errors import UserError
from recallzoo.options import OptionValue, fits
from recallzoo.report._about import contracts
from recallzoo.result import Result, SliceRow, mistake
from recallzoo.store import Store

TABLE_ENDING = ".parquet"
_NO_COLUMN = ("config", "provenance", "metrics", "rows")
_OF_RESULT = tuple(f.name for f in dataclasses.fields(Result) if f.name not in _NO_COLUMN)
_OF_PROVENANCE = ("device", "commit")


@dataclass(frozen=True)
class Runs:
    """Finished runs and what is known of how they were made."""

    name: str
    results: list[Result]
    """Without rows and metrics, which would fill the memory."""
    rows_of: Callable[[str], list[SliceRow]]
    """Accuracy by slice of a run, by its hash."""
    planned: dict[str, str] = field(default_factory=dict)
    """Hash -> words for its cell, of the runs that were asked for, finished or not."""
    commands: list[str] = field(default_factory=list)
    contracts: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    is_table: bool = False
    """Then nothing else is known of the runs than their row."""

    def missing(self) -> dict[str, tuple[int, int]]:
        """By cell, how many of the planned runs are not finished, and of how many. Cells without
        one are left out."""
        finished = {result.hash for result in self.results}
        of = Counter(self.planned.values())
        left = Counter(cell for one, cell in self.planned.items() if one not in finished)
        return {cell: (left[cell], of[cell]) for cell in of if left[cell]}


def open_runs(paths: Sequence[Path]) -> Runs:
    """The runs of all these folders and tables. A run that several have counts once, as in the
    first folder that has it, or else the first table.

    Raises UserError for what is neither or holds no finished run and for a damaged table,
    StoreError for a damaged folder.
    """
    parts = [
        runs_of_table(path)
        if path.suffix == TABLE_ENDING and not path.is_dir()
        else runs_of_store(Store(path, create=False))
        for path in paths
    ]
    return parts[0] if len(parts) == 1 else _joined(parts)


def runs_of_store(store: Store) -> Runs:
    """All runs of a results folder. UserError if none is finished, StoreError if it is damaged."""
    planned = {run_hash: run["cell"] for run_hash, run in store.planned().items()}
    for members in store.packs().values():  # of folders older than planned.json
        for run_hash in members:
            planned.setdefault(run_hash, "cells that are not described")
    hashes = store.hashes()
    progress = tqdm(hashes, desc="reading runs", unit="run", disable=None, delay=2, leave=False)
    runs = Runs(
        name=store.folder.resolve().name,
        results=[dataclasses.replace(store.read(h), rows=[], metrics=[]) for h in progress],
        rows_of=lambda run_hash: store.read(run_hash).rows,
        planned=planned,
        commands=store.commands(),
        contracts=contracts(store),
    )
    if not runs.results:
        waiting = sum(left for left, _ in runs.missing().values())
        hint = (
            f"{waiting} runs are planned in it: finish them with the same recallzoo run command"
            if waiting
            else "train some first, for example with recallzoo run quickstart"
        )
        raise UserError(f"{store.folder} holds no finished runs to report on; {hint}.")
    return runs


def runs_of_table(path: Path, *, or_folder: bool = True) -> Runs:
    """All runs of a table, each once. UserError if it is none, has no rows or is damaged; it names
    a results folder as another way, or not."""
    wanted = (
        "Give a results folder, or the table.parquet that recallzoo run keeps in it."
        if or_folder
        else "Give the table.parquet that recallzoo run keeps in a results folder, or a copy of it."
    )
    try:
        table = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}). {wanted}") from error
    lacks = [
        name for name in (*_OF_RESULT, *_OF_PROVENANCE) if name not in (*table.columns, "rows")
    ]
    if lacks:
        raise UserError(f"{path} is no table of runs: it lacks {', '.join(lacks)}. {wanted}")
    if table.is_empty():
        raise UserError(f"{path} has no runs in it. {wanted}")
    once = table.unique("hash", keep="first", maintain_order=True)
    remarks = [
        f"{path.name} is a table of runs: it has no accuracy by slice, and of versions the commit "
        f"alone. Neither fallbacks nor runs that are not finished stand in it, so none are told."
    ]
    if doubles := table.height - once.height:
        remarks.append(
            f"{doubles} rows of {path.name} are of a run that stands in it already: they are left "
            f"out."
        )
    return Runs(
        name=path.stem,
        results=[_result(row, path, or_folder) for row in once.iter_rows(named=True)],
        rows_of=lambda _: [],
        remarks=remarks,
        is_table=True,
    )


def _joined(parts: Sequence[Runs]) -> Runs:
    results: dict[str, Result] = {}
    home: dict[str, Runs] = {}
    planned: dict[str, str] = {}
    for part in sorted(parts, key=lambda part: part.is_table):
        for result in part.results:
            results.setdefault(result.hash, result)
            home.setdefault(result.hash, part)
        for run_hash, cell in part.planned.items():
            planned.setdefault(run_hash, cell)
    repeated = sum(len(part.results) for part in parts) - len(results)
    remarks = list(dict.fromkeys(remark for part in parts for remark in part.remarks))
    if repeated:
        remarks.append(
            f"{repeated} runs stand in more than one of the places given; what the first folder "
            f"has is shown, or else the first table."
        )
    return Runs(
        name=" + ".join(part.name for part in parts),
        results=[results[run_hash] for run_hash in sorted(results)],
        rows_of=lambda run_hash: home[run_hash].rows_of(run_hash),
        planned=planned,
        commands=list(dict.fromkeys(command for part in parts for command in part.commands)),
        contracts=[contract for part in parts for contract in part.contracts],
        remarks=remarks,
    )


def _result(row: dict[str, Any], path: Path, or_folder: bool) -> Result:
    """A run of a row of a table: the inverse of `Store.table`, as far as that goes."""
    content = {name: row[name] for name in _OF_RESULT}
    content["state_size"] = {} if row["state_size"] is None else {"all": row["state_size"]}
    content["provenance"] = {name: row[name] for name in _OF_PROVENANCE}
    try:
        content["config"] = _config(row)
        wrong = mistake(content)
    except (ValueError, RecursionError) as error:
        wrong = f"its row cannot be read ({error})"
    if wrong is not None:
        raise UserError(
            f"{path}, run {row['hash']}: {wrong}. The table was damaged or changed. Give it as "
            f"recallzoo run wrote it{', or its results folder' if or_folder else ''}."
        )
    return Result(**content)


def _config(row: dict[str, Any]) -> dict[str, Any]:
    """Dotted columns as a nested configuration; JSON text as the lists it was. ValueError for a
    column that cannot be part of one."""
    config: dict[str, Any] = {}
    for name, value in row.items():
        if not fits(value, OptionValue):
            raise ValueError(f"{name} is {value!r:.40}, where text or a number is wanted")
        if name in _OF_RESULT or name in _OF_PROVENANCE:
            continue
        *outer, last = name.split(".")
        inner = config
        for one in outer:
            inner = inner.setdefault(one, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name} is a part of {one}, which is a value and has no parts")
        is_list = isinstance(value, str) and value.startswith("[")
        inner[last] = json.loads(value) if is_list else value
    return config
