"""A folder of results that survives whatever happens to the process that writes it.

    DIR/
      store.json                 format version
      commands.json              the command lines that trained here, in order
      sweep.json                 how and how long each call of a sweep trained
      planned.json               what every run that was asked for is, finished or not
      runs/<hash>/               one finished run, written at once; present means whole
        result.json              config, outcome, provenance
        metrics.jsonl            one line a look at the validation set
        rows.parquet             test accuracy by slice: slice, value, correct, total
      packs/<hash>/              runs in training together
        pack.json                which
        checkpoint.safetensors   where they are

A run is never half there: its folder appears by one rename. The result table is derived from
`runs/` and can be rebuilt at any time. Nothing here imports torch.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from recallzoo.errors import StoreError, UserError
from recallzoo.files import (
    atomic_file,
    atomic_folder,
    is_vacant,
    read_json,
    remove_leftovers,
    require_folder,
    write_json,
)
from recallzoo.result import Result, SliceRow, mistake

STORE_VERSION = 1
PLAN_VERSION = 1
ROWS_SCHEMA = {"slice": pl.String, "value": pl.Int64, "correct": pl.Int64, "total": pl.Int64}


class Store:
    """Results in a folder. Opening one checks its version.

    Raises UserError for a folder that is something else or was written by a newer version,
    StoreError for one that is damaged or cannot be written.
    """

    def __init__(self, folder: Path | str, *, create: bool = True) -> None:
        self.folder = Path(folder)
        marker = self.folder / "store.json"
        require_folder(self.folder, "a results folder")
        if marker.exists():
            try:
                content = read_json(marker)
            except StoreError as error:
                raise self._unmarked(marker) from error
            version = content.get("store_version") if isinstance(content, dict) else None
            if not isinstance(version, int):
                raise self._unmarked(marker)
            if version > STORE_VERSION:
                raise UserError(
                    f"{self.folder} was written by a newer recallzoo (store version {version}, "
                    f"this one knows {STORE_VERSION}). Upgrade recallzoo or use another folder."
                )
        elif not create:
            raise UserError(
                f"{self.folder} holds no results (no store.json). Give the folder that "
                f"`recallzoo run` wrote, or run a recipe first."
            )
        elif not is_vacant(self.folder):
            raise UserError(
                f"{self.folder} is not empty and is no results folder. Choose another folder, so "
                f"that nothing of yours is mixed with results."
            )
        else:
            self.mark()

    def mark(self) -> None:
        """Say that the folder is one of results, where that is not said."""
        marker = self.folder / "store.json"
        if not marker.exists():
            write_json(marker, {"store_version": STORE_VERSION})

    @staticmethod
    def _unmarked(marker: Path) -> StoreError:
        # Without the file the folder would be taken for something else, and be refused.
        return StoreError(
            f"{marker} names no store version: it is damaged. Replace it by one that says "
            f'{{"store_version": {STORE_VERSION}}}, the version of this recallzoo. The runs beside '
            f"it do not depend on it: do not delete them."
        )

    def clear_leftovers(self) -> None:
        """Delete what killed processes left half written. For whoever holds the folder's lock:
        another machine's process at work is not seen from here."""
        for sub in ("runs", "packs"):
            if (self.folder / sub).is_dir():
                remove_leftovers(self.folder / sub)

    def has(self, run_hash: str) -> bool:
        """Whether this run is finished."""
        return (self.folder / "runs" / run_hash / "result.json").exists()

    def write(self, result: Result) -> None:
        """Store a finished run, all of it or nothing. One already there is kept."""
        target = self.folder / "runs" / result.hash
        if self.has(result.hash):
            return
        if target.is_dir():
            # Folders appear whole, so this one was damaged later; in its place ours would be lost.
            shutil.rmtree(target, ignore_errors=True)
        self.mark()  # the folder may have been deleted since it was opened
        content = asdict(result)
        metrics, rows = content.pop("metrics"), content.pop("rows")
        with atomic_folder(target) as folder:
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps(line, allow_nan=False) + "\n" for line in metrics)
            )
            pl.DataFrame(rows, schema=ROWS_SCHEMA).write_parquet(folder / "rows.parquet")
            write_json(folder / "result.json", content)

    def packs(self) -> dict[str, list[str]]:
        """Runs in training together, by the name of their pack. StoreError for a damaged one."""
        found = {}
        for record in sorted((self.folder / "packs").glob("[!.]*/pack.json")):
            members = read_json(record)
            if not (isinstance(members, list) and all(isinstance(h, str) for h in members)):
                raise StoreError(f"{record} is damaged. Delete {record.parent} and run again.")
            found[record.parent.name] = members
        return found

    def plan(self, runs: dict[str, dict[str, Any]]) -> None:
        """Remember what was asked for: hash -> what the run is, in a few plain words. Runs that
        earlier calls asked for stay."""
        known = self.planned()
        if not runs.keys() <= known.keys():
            content = {"plan_version": PLAN_VERSION, "runs": known | runs}
            write_json(self.folder / "planned.json", content)

    def planned(self) -> dict[str, dict[str, Any]]:
        """What `plan` was given. StoreError if it is damaged or of a newer version."""
        path = self.folder / "planned.json"
        if not path.exists():
            return {}
        remedy = "the results do not need it, and recallzoo run writes it anew"
        content = read_json(path, f"delete it: {remedy}")
        version = content.get("plan_version") if isinstance(content, dict) else None
        runs = content.get("runs") if version == PLAN_VERSION else None
        if not isinstance(runs, dict) or not all(
            isinstance(run, dict) and isinstance(run.get("cell"), str) for run in runs.values()
        ):
            raise StoreError(
                f"{path} is damaged, or was written by a newer recallzoo (plan version {version}, "
                f"this one knows {PLAN_VERSION}). Delete it: {remedy}."
            )
        return runs

    def hashes(self) -> list[str]:
        """The finished runs."""
        return sorted(p.parent.name for p in (self.folder / "runs").glob("[!.]*/result.json"))

    def read(self, run_hash: str) -> Result:
        """One finished run. Raises StoreError if any of its files is damaged."""
        folder = self.folder / "runs" / run_hash
        try:
            content = read_json(folder / "result.json")
            self._require_result(content, folder)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            if not lines:
                raise ValueError("metrics.jsonl is empty, and a finished run has lines in it")
            rows = pl.read_parquet(folder / "rows.parquet", glob=False)
            return Result(
                **content,
                metrics=[json.loads(line) for line in lines],
                rows=[SliceRow(**row) for row in rows.iter_rows(named=True)],
            )
        except (OSError, ValueError, TypeError, pl.exceptions.PolarsError) as error:
            raise self._damaged(run_hash, error) from error

    @staticmethod
    def _require_result(content: Any, folder: Path) -> None:
        wrong = mistake(content)
        if wrong is None and content["hash"] != folder.name:
            wrong = f"hash is {content['hash']!r}, where the name of its folder is wanted"
        if wrong is not None:
            raise StoreError(
                f"{folder / 'result.json'} was changed after it was written: {wrong}. Put it back "
                f"as it was, or delete {folder} and run the recipe again: only this run is "
                f"repeated."
            )

    def _damaged(self, run_hash: str, error: Exception) -> StoreError:
        return StoreError(
            f"run {run_hash} in {self.folder} is damaged ({type(error).__name__}: {error}). "
            f"Delete {self.folder / 'runs' / run_hash} and run the recipe again: only this run is "
            f"repeated."
        )

    def results(self) -> Iterator[Result]:
        """All finished runs, by hash."""
        for run_hash in self.hashes():
            yield self.read(run_hash)

    def table(self) -> pl.DataFrame:
        """One row a run, its configuration flattened to columns such as `model.d_model`."""
        return table_of(self.results())

    def slices(self) -> pl.DataFrame:
        """One row a run and slice value: hash, slice, value, correct, total."""
        frames = [pl.DataFrame(schema={"hash": pl.String, **ROWS_SCHEMA})]
        for run_hash in self.hashes():
            try:
                path = self.folder / "runs" / run_hash / "rows.parquet"
                rows = pl.read_parquet(path, glob=False)
                frames.append(rows.select(pl.lit(run_hash).alias("hash"), *ROWS_SCHEMA))
            except (OSError, pl.exceptions.PolarsError) as error:
                raise self._damaged(run_hash, error) from error
        return pl.concat(frames)

    def add_command(self, command: str) -> None:
        """Remember a command line that trains into this folder; one known already stays."""
        known = self.commands()
        if command not in known:
            write_json(self.folder / "commands.json", [*known, command])

    def commands(self) -> list[str]:
        """The command lines that trained into this folder, oldest first."""
        path = self.folder / "commands.json"
        remedy = "the results do not need it"
        content = read_json(path, f"delete it: {remedy}") if path.exists() else []
        if not (isinstance(content, list) and all(isinstance(line, str) for line in content)):
            raise StoreError(f"{path} is damaged. Delete it: {remedy}.")
        return content

    def write_table(self) -> Path:
        """Write `table.parquet`, the derived table of all runs, and return its path."""
        path = self.folder / "table.parquet"
        with atomic_file(path) as temporary:
            self.table().write_parquet(temporary)
        return path


def table_of(results: Iterable[Result]) -> pl.DataFrame:
    """One row a run, by hash, its configuration flattened to columns such as `model.d_model`."""
    rows = []
    for result in results:
        content = asdict(result)
        for name in ("metrics", "rows", "provenance"):
            del content[name]
        config, sizes = content.pop("config"), content.pop("state_size")
        rows.append(
            {
                **content,
                "state_size": sum(sizes.values()) if sizes else None,
                **flatten(config),
                "device": result.provenance.get("device"),
                "commit": result.provenance.get("commit"),
            }
        )
    rows.sort(key=lambda row: row["hash"])
    return pl.DataFrame(rows, infer_schema_length=None)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted columns; lists become JSON text."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else value
    return flat
