"""Charts and HTML pages out of stored rows. Nothing here imports torch."""

from recallzoo.report._audit import write_audit_report
from recallzoo.report._sources import Runs, open_runs, runs_of_table
from recallzoo.report._training import is_training, write_training_report
from recallzoo.report._write import write_report

__all__ = [
    "Runs",
    "is_training",
    "open_runs",
    "runs_of_table",
    "write_audit_report",
    "write_report",
    "write_training_report",
]
