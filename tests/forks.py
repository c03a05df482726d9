"""Processes that start at once, forked from one that has imported what they need.

Starting Python and importing PyTorch takes longer than most of what tests do in a process of its
own. These can be killed and watched like any other; how a user's process starts is tested by
those that use `subprocess`.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

COMMAND_LINE = "from recallzoo.__main__ import start; start()"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "recallzoo.cli.commands.run",
        "recallzoo.sweep",
        "recallzoo.text.counting",
        "recallzoo.text.preparing",
        "recallzoo.train.packed",
        "recallzoo.train.pretrain",
        "sympy",  # what PyTorch imports when a pack is built
        "torch._dynamo",
    ]
)


class Forked:
    """Python source run in a process of its own, with `arguments` in sys.argv.

    What it prints goes to files, as a pipe that nobody reads would stop it.
    """

    def __init__(self, source: str, *arguments: object) -> None:
        self._folder = tempfile.TemporaryDirectory()  # goes with this object
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        words = [str(argument) for argument in arguments]
        self._process = _context.Process(target=_run, args=(source, words, self._out, self._err))
        self._process.start()
        atexit.register(self._process.kill)  # a failed test leaves its process behind

    @property
    def out(self) -> str:
        """What it has printed."""
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        """What it has printed on stderr."""
        return self._err.read_text() if self._err.exists() else ""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 120) -> int:
        """Wait for the end; the exit code, minus the signal's number where one ended it."""
        self._process.join(seconds)
        code = self.poll()
        assert code is not None, f"still running after {seconds} s"
        return code

    def wait_for(self, words: str, seconds: float = 120) -> None:
        """Return once these words are on stderr."""
        deadline = time.monotonic() + seconds
        while words not in self.err:
            assert self.poll() is None, f"ended before {words!r} appeared: {self.err}"
            assert time.monotonic() < deadline, f"no {words!r} in {seconds} s"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it as the system does when it is out of memory."""
        self.send(signal.SIGKILL)
        self.wait()


def _run(source: str, arguments: list[str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (for the whole process)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["forked", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(compile(source, "forked", "exec"), {"__name__": "__main__"})
