"""Write the charts of a results folder as one HTML file that works offline.

examples:
  recallzoo report runs/quickstart
  recallzoo report runs/figure2 --out figures --formats html svg png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from recallzoo.cli._options import parse

Format = Literal["html", "svg", "png"]


@dataclass(frozen=True)
class ReportOptions:
    """What to draw, and where to."""

    folder: tyro.conf.Positional[Path]
    """Results folder that `recallzoo run` wrote."""
    out: Path | None = None
    """Folder for the report; FOLDER/report if not given."""
    formats: tuple[Format, ...] = ("html", "svg", "png")
    """What to write: the HTML page, and its charts as SVG and PNG."""


def main(argv: list[str]) -> int:
    """`recallzoo report`."""
    options = parse(ReportOptions, argv, "report", __doc__)
    from recallzoo.store import Store

    store = Store(options.folder, create=False)
    from recallzoo.report import write_report

    written = write_report(store, options.out or options.folder / "report", options.formats)
    for path in written:
        print(path)
    return 0
