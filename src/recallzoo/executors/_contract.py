"""What a sweep asks of an executor, and whom an executor tells."""

import warnings
from collections.abc import Callable
from typing import Literal, Protocol

from recallzoo.result import Result
from recallzoo.run import Run
from recallzoo.store import Store
from recallzoo.train.packed import Progress

NamedPack = tuple[str, list[Run]]
"""The name of a pack's folder under `packs/`, and its runs."""


class Watcher(Protocol):
    """Told what happens in a sweep, as it happens."""

    def sweep_started(self, num_runs: int, num_finished: int, num_packs: int) -> None: ...
    def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None: ...
    def pack_progressed(self, progress: Progress) -> None: ...
    def run_finished(self, result: Result) -> None: ...
    def pack_ended(self) -> None: ...
    def warned(self, message: str) -> None: ...


class Unwatched:
    """A watcher for whom a sweep is one call: it passes on warnings as Python's, and no more."""

    def sweep_started(self, num_runs: int, num_finished: int, num_packs: int) -> None: ...
    def pack_started(self, runs: list[Run], number: int, num_packs: int) -> None: ...
    def pack_progressed(self, progress: Progress) -> None: ...
    def run_finished(self, result: Result) -> None: ...
    def pack_ended(self) -> None: ...

    def warned(self, message: str) -> None:
        warnings.warn(message, stacklevel=3)


Halve = Callable[[str, list[Run]], list[NamedPack]]
"""Records and returns smaller packs in place of one that ran out of memory."""


class Executor(Protocol):
    """Where packs train."""

    @property
    def device(self) -> str:
        """The kind of its devices, or the one it has."""
        ...

    @property
    def num_devices(self) -> int:
        """How many of them it uses at once."""
        ...

    @property
    def sharing(self) -> Literal["mps", "turns"] | None:
        """How packs share a GPU: at once, through NVIDIA's Multi-Process Service, or in turns;
        None where they do not."""
        ...

    def runs_that_fit(self, run: Run) -> int:
        """How many runs like this one are expected to train at once in a pack's share of one of
        its devices."""
        ...

    def train(self, packs: list[NamedPack], store: Store, watcher: Watcher, halve: Halve) -> None:
        """Train all of them, or as many as its time allows. Each result is in the store, and told
        of, when its run finishes. Raises what a pack raised; what was finished is kept."""
        ...
