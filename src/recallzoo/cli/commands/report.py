"""Write the charts of a results folder, or of an audit, as one HTML file that works offline.

examples:
  recallzoo report runs/quickstart
  recallzoo report runs/figure2 --out figures --formats html svg png
  recallzoo report audits/data-test
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

    folder: tyro.conf.Positional[Path]
    """Folder that `recallzoo run` or `recallzoo audit` wrote."""
    out: Path | None = None
    """Folder for the report; FOLDER/report if not given."""
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
    from recallzoo.evaluate.audit_store import SETTINGS
    from recallzoo.report import write_audit_report, write_report
    from recallzoo.store import Store

    out = options.out or options.folder / "report"
    if (options.folder / SETTINGS).exists():
        written = write_audit_report(options.folder, out, options.formats)
    else:
        written = write_report(Store(options.folder, create=False), out, options.formats)
    for path in written:
        print(path)
    return 0
