"""Write the charts of results, of an audit, or of pretraining, as one HTML file that works offline.

usage: recallzoo report FOLDER [--out DIR] [--formats ...]
       recallzoo report FOLDER_OR_TABLE FOLDER_OR_TABLE... --out DIR

Several are drawn as one: a sweep that was trained on several machines, or a table.parquet that
someone published beside runs of your own. A run that several have counts once. Of pretraining
runs, finished or not, curves stand side by side: loss on AR hits and on other tokens over training.

examples:
  recallzoo report runs/quickstart
  recallzoo report runs/figure2 --out figures --formats html svg png
  recallzoo report audits/data-test
  recallzoo report machine-a/runs machine-b/runs --out report
  recallzoo report published/table.parquet runs/mine --out report
  recallzoo report runs/attention-70m runs/hyena-70m --out report
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from recallzoo.cli._options import parse
from recallzoo.errors import UserError

Format = Literal["html", "svg", "png"]


@dataclass(frozen=True)
class ReportOptions:
    """What to draw, and where to."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders that `recallzoo run` wrote, or the table.parquet in one; folders of `recallzoo
    pretrain`; or one that `recallzoo audit` wrote."""
    out: Path | None = None
    """Folder for the report; FOLDER/report if not given, where there is one folder."""
    formats: tuple[Format, ...] = ("html", "svg", "png")
    """What to write: the HTML page, and its charts as SVG and PNG."""


def main(argv: list[str]) -> int:
    """`recallzoo report`."""
    options = parse(ReportOptions, argv, "report", __doc__)
    if not options.formats:
        raise UserError(
            f"--formats names nothing to write. Give some of {', '.join(get_args(Format))}, or "
            f"leave it out for all."
        )
    if not options.paths:
        raise UserError(
            "no folder is given to report on. Name one that recallzoo run or recallzoo audit "
            "wrote: recallzoo report runs/quickstart"
        )
    from recallzoo.evaluate.audit_store import MANIFEST, SETTINGS
    from recallzoo.report import (
        is_training,
        open_runs,
        write_audit_report,
        write_report,
        write_training_report,
    )

    first, *others = options.paths
    out = options.out
    if out is None and not others and not first.is_file():
        out = first / "report"
    if out is None:
        raise UserError(
            "--out is wanted, the folder for the report: several results, or a table, have none "
            "of their own."
        )
    audits = [
        path for path in options.paths if (path / SETTINGS).exists() or (path / MANIFEST).exists()
    ]
    if audits and others:
        raise UserError(
            f"{audits[0]} is an audit, of which each has a report of its own. Give it alone."
        )
    trainings = [path for path in options.paths if is_training(path)]
    if trainings and len(trainings) < len(options.paths):
        other = next(path for path in options.paths if path not in trainings)
        raise UserError(
            f"{trainings[0]} is a pretraining run and {other} is none. A report is of either: "
            f"give them in two commands."
        )
    if trainings:
        written = write_training_report(trainings, out, options.formats)
    elif audits:
        written = write_audit_report(first, out, options.formats)
    else:
        written = write_report(open_runs(options.paths), out, options.formats)
    for path in written:
        print(path)
    return 0
