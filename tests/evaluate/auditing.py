"""Audits of small models, for tests."""

from pathlib import Path

from recallzoo.evaluate.audit import audit
from recallzoo.evaluate.audit_options import AuditOptions
from recallzoo.evaluate.audit_store import Audit
from recallzoo.text import PAPER_RATE

RATES = (PAPER_RATE, 1e-2)
"""The corpus is so small that the paper's cut is 0 occurrences."""


def options(here: Path, out: Path, *models: str, **changes) -> AuditOptions:
    defaults = {
        "models": tuple(str(here / model) for model in models or ("a",)),
        "data": here / "data",
        "context": 32,
        "out": out,
        "cut_rates": RATES,
        "resamples": 100,
        "device": "cpu",
        "part_tokens": 500,
    }
    return AuditOptions(**{**defaults, **changes})


def run(here: Path, out: Path, *models: str, **changes) -> Audit:
    return audit(options(here, out, *models, **changes), progress=False)
