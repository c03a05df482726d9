"""What a contract check found, in words."""

import traceback
from dataclasses import dataclass
from pathlib import Path


class Violation(Exception):
    """Raised by a check; the message is its detail."""


class NotGiven(Exception):
    """Raised by a check of something that a user's own mixer may leave out."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    passed   None if it could not be decided: the mixer does not give what is checked, or an
             earlier check failed. That is no failure, but no promise either.
    """

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.detail else self.name


@dataclass(frozen=True)
class ContractReport:
    """All checks of one mixer, in the order made."""

    mixer: str
    checks: tuple[Check, ...]
    state_size: dict[str, int] | None
    """Elements carried for one sequence, by kind; None if unknown."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed. What was not given does not count."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def undecided(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.passed is None)

    def summary(self) -> str:
        """Plain text: a line for each check, one for all that could not be made for the same
        reason, one for the whole."""
        words = {True: "ok", False: "FAILED", None: "not checked"}
        width = max((len(check.name) for check in self.checks), default=0)
        lines = []
        for index, check in enumerate(self.checks):
            if index and check.passed is None and check.detail == self.checks[index - 1].detail:
                continue
            name = check.name
            alike = [c for c in self.checks[index:] if (c.passed, c.detail) == (None, check.detail)]
            if len(alike) > 1:
                name = f"{len(alike)} others"
            lines.append(f"  {name:<{width}}  {words[check.passed]:<11}  {check.detail}".rstrip())
        passed = sum(check.passed is True for check in self.checks)
        counts = [f"{passed} of {len(self.checks)} checks passed"]
        if self.failures:
            counts.append(f"{len(self.failures)} failed")
        if self.undecided:
            counts.append(f"{len(self.undecided)} not checked")
        return "\n".join([self.mixer, *lines, f"  {', '.join(counts)}"])


def describe_error(error: BaseException, path: Path | None) -> str:
    """An exception in one line; with the last line of the user's file that it passed, if any."""
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = text[:300] + " ..."
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if path is not None and Path(frame.filename) == path
    ]
    where = f"{path.name}:{lines[-1]}: " if path is not None and lines else ""
    return f"{where}{type(error).__name__}: {text}"
