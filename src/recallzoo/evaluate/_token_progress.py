"""How far a long pass over tokens is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0


class TokenProgress:
    """Counts tokens; shows how many of how many, and how many a second. Writes to stderr."""

    def __init__(self, what: str, total: int, *, done: int = 0, show: bool = True) -> None:
        self._what, self._total, self._done, self._show = what, total, done, show
        self._before = done
        self._start = self._last_line = time.monotonic()
        is_live = show and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc=what, unit="tok", unit_scale=True)
            if is_live
            else None
        )

    def __enter__(self) -> "TokenProgress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._done > self._before:
            self._line()

    def add(self, tokens: int) -> None:
        """Count tokens as done."""
        self._done += tokens
        if self._bar is not None:
            self._bar.update(tokens)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._line()

    def say(self, line: str) -> None:
        """A line that is kept above the bar."""
        if self._show:
            tqdm.write(line, file=sys.stderr)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = (self._done - self._before) / max(self._last_line - self._start, 1e-9)
        self.say(f"{self._what}: {self._done:,} of {self._total:,} tokens, {rate:,.0f} tokens/s")
