"""What can go wrong for a user, as a tree.

    RecallzooError              exit code 1: the work could not be finished
    +-- StoreError              a results folder, checkpoint or data file is damaged or unwritable
    +-- UserError               exit code 2: what was asked for cannot be done
        +-- UnknownName         no such mixer, task, recipe, ...; near names are suggested
        +-- InvalidConfig       sizes or options that contradict each other
        +-- ContractViolation   a mixer or task does not keep the contract

A message says what was given, what is wanted and what to do next, in that order. Bugs of
our own stay ordinary exceptions and show their traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_OUT_OF_TIME = 75
"""What commands end with that were given a time and have work left; EX_TEMPFAIL of sysexits.h."""


class RecallzooError(Exception):
    """The work could not be finished; the message is meant for the user."""

    exit_code = 1


class StoreError(RecallzooError):
    """A file or folder of results, checkpoints or data cannot be read or written."""


class UserError(RecallzooError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class InvalidConfig(UserError, ValueError):
    """Sizes or options that are out of range or contradict each other."""


class ContractViolation(UserError):
    """A mixer or task returned something its contract does not allow."""


class UnknownName(UserError, LookupError):
    """A name that nothing is registered under.

    >>> print(UnknownName("mixer", "baseconv", ["attention", "base_conv"]))
    no mixer is called 'baseconv'. Did you mean 'base_conv'? Known: attention, base_conv.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        super().__init__(f"no {kind} is called {name!r}.{hint} Known: {', '.join(names)}.")
