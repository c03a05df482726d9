"""Charts and one HTML page out of stored rows. Nothing here imports torch."""

from recallzoo.report._write import write_report

__all__ = ["write_report"]
