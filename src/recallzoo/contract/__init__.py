"""Whether a mixer keeps its contract: one set of checks for the package's own and a user's.

report = check_mixer(mixer("path/to/file.py:Class"))
print(report.summary())
"""

from collections.abc import Callable, Sequence
from functools import partial

from recallzoo.contract._causality import causal, rows_apart
from recallzoo.contract._forms import (
    asked_positions,
    bfloat16,
    constructs,
    deterministic,
    finite,
    initialisation,
    lengths,
    measured_state,
    output,
    state,
    step,
)
from recallzoo.contract._packing import compiles, packs
from recallzoo.contract._report import Check, ContractReport, NotGiven, Violation, describe_error
from recallzoo.contract._subject import Subject
from recallzoo.mixers import MixerConfig

__all__ = ["CHECKS", "Check", "ContractReport", "check_mixer", "describe_error"]

_PREREQUISITES: dict[str, Callable[[Subject], str]] = {
    "constructs": constructs,
    "output shape and dtype": output,
    "finite": finite,
}
"""Without these nothing else can be judged."""

_CHECKS: dict[str, Callable[[Subject], str]] = {
    **_PREREQUISITES,
    "causal in training": partial(causal, training=True),
    "causal in evaluation": partial(causal, training=False),
    "rows apart": rows_apart,
    "deterministic": deterministic,
    "lengths": lengths,
    "asked positions": asked_positions,
    "step equals forward": step,
    "state size": state,
    "packs": packs,
    "compiles": compiles,
    "initialisation": initialisation,
    "bfloat16": bfloat16,
}

CHECKS: tuple[str, ...] = tuple(_CHECKS)
"""The names of the checks, in the order made."""


def check_mixer(
    config: MixerConfig,
    *,
    d_model: int = 16,
    seq_len: int = 17,
    only: Sequence[str] = CHECKS,
) -> ContractReport:
    """Check a mixer. Never raises for what the mixer does; the report says it.

    A user's own mixer may leave out `step` and need not work in bfloat16; the report then says
    so without failing it. A registered one may not.

    only   checks to make beside those that all others rest on: building, shape, finite numbers
    """
    unknown = sorted(set(only) - set(CHECKS))
    if unknown:
        raise ValueError(f"no check is called {unknown[0]!r}; known: {', '.join(CHECKS)}")
    subject = Subject(config, d_model, seq_len)
    checks: list[Check] = []
    for name, function in _CHECKS.items():
        if name not in _PREREQUISITES and name not in only:
            continue
        stopped_by = [c.name for c in checks if c.passed is False and c.name in _PREREQUISITES]
        if stopped_by:
            checks.append(Check(name, None, f"needs '{stopped_by[0]}'"))
        else:
            checks.append(_make(name, function, subject))
    return ContractReport(str(config), tuple(checks), _state_size(subject, checks))


def _make(name: str, function: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, True, function(subject))
    except Violation as violation:
        return Check(name, False, str(violation))
    except NotGiven as missing:
        return Check(name, None, str(missing))
    except Exception as error:  # noqa: BLE001 - anything may go wrong in a user's code
        return Check(name, False, describe_error(error, subject.path))


def _state_size(subject: Subject, checks: list[Check]) -> dict[str, int] | None:
    decided = {check.name: check.passed for check in checks}
    if not decided.get("state size"):
        return None
    return measured_state(subject)
