"""Being stopped by Ctrl-C or SIGTERM: soon, with one message and one exit code, whatever runs.

The first signal raises KeyboardInterrupt in the main thread, so that what is under way ends in
order; but not below PyTorch, whose C++ aborts the process when Python that it calls raises where it
expects none. Libraries may also sit in C for minutes, swallow the exception or turn it into another
one, and their threads abort when the interpreter is taken down beneath them. So a thread sees the
signals as well: it ends the process at a second one, and when the main thread takes too long; and a
process that was interrupted never takes down its interpreter. It may end anywhere, as files are
whole or absent (`recallzoo.files`).
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

EXIT_INTERRUPTED = 130
MESSAGE = "stopped; finished work is kept; run the same command to go on."
SIGNALS = (signal.SIGINT, signal.SIGTERM)

STUCK_SECONDS = 2.0
"""Until the process ends if its main thread does not come back from C, or from PyTorch."""
RETRY_SECONDS = 0.02
RETRY = signal.SIGURG
"""What the thread sends to the main one to look again: by default it means nothing."""
ENDING_SECONDS = 10.0
"""Until it ends if the main thread saw it, and is not done with ending."""
SAME_SECONDS = 0.3
"""Signals this close are one: `timeout`, `uv run` and torchrun pass on what the terminal sends to
the whole group anyway."""


class _Watch:
    """What is known of this process's signals; set up once, by `run_process`."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)  # as signal.set_wakeup_fd wants it
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self.told = self.raised = self.said = False
        self.deadline: float | None = None
        self._blocked: set[Any] = set()
        self.exit_code: int | None = None
        """Of work that is over: a signal then ends the process with it."""

    def start(self) -> None:
        threading.Thread(target=self._watch, name="recallzoo-signals", daemon=True).start()
        sys.unraisablehook = _after(sys.unraisablehook, self._nowhere_to_raise)
        threading.excepthook = _after(threading.excepthook, self._nowhere_to_raise)
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=self._stop_in_child
        )
        signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        signal.signal(RETRY, self._main_looks)
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN:  # as nohup and `command &` in a script have it
                signal.signal(number, self._main_sees)

    def allow(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(BlockingIOError):  # full of signals, which wake the thread as well
            os.write(self.write, b"\0")

    def end_now(self) -> NoReturn:
        if self.exit_code is None:
            self.say_directly()
        os._exit(EXIT_INTERRUPTED if self.exit_code is None else self.exit_code)

    def say_directly(self) -> None:
        """Past Python's streams, whose locks the main thread may hold; and not into a full pipe."""
        if not self.said and select.select([], [2], [], 0)[1]:
            self.said = True
            if _speaks():
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{MESSAGE}\n".encode())

    def _main_sees(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is not None:
            self.end_now()
        self.told = True
        self._main_looks(number, frame)

    def _main_looks(self, _number: int, frame: FrameType | None) -> None:
        if self.told and not self.raised and not _below_torch(frame):
            self.raised = True
            self.allow(ENDING_SECONDS)
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first, main = None, threading.main_thread().ident
        assert main is not None
        while True:
            left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            if left is not None and not self.raised:
                left = min(left, RETRY_SECONDS)
            if not select.select([self.read], [], [], left)[0]:
                if self.deadline is None or time.monotonic() < self.deadline:
                    signal.pthread_kill(main, RETRY)
                    continue
                self.end_now()
            if not set(os.read(self.read, 4096)).intersection(SIGNALS):
                continue
            now = time.monotonic()
            if first is None:
                first = now
                if self.deadline is None:
                    self.deadline = now + STUCK_SECONDS
            elif now - first > SAME_SECONDS:
                self.end_now()

    def _nowhere_to_raise(self, what: Any) -> bool:
        """Of an exception in a finaliser or a thread: end the process if it is the interruption.
        Whether it may be one of its consequences, of which nothing is said."""
        if self.told and issubclass(what.exc_type, KeyboardInterrupt):
            self.end_now()
        return self.told

    def _block(self) -> None:
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _stop_in_child(self) -> None:
        """A child that is forked is not this command, and must not write into its pipe."""
        signal.set_wakeup_fd(-1)
        signal.signal(RETRY, signal.SIG_DFL)
        for number, handler in self.before.items():
            if signal.getsignal(number) == self._main_sees:
                signal.signal(number, handler)
        self._unblock()


_watch: _Watch | None = None


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run a command as this process, and end the process with the code it returns; with
    EXIT_INTERRUPTED, and MESSAGE on stderr, where it is stopped by a signal."""
    global _watch
    _watch = _Watch()
    atexit.register(_ignore_signals)  # the first to register is the last to run
    try:
        _watch.start()
        _watch.exit_code = main()
    except BaseException:
        if not interrupted():
            _watch.exit_code = 1
            raise
    if interrupted():
        _leave(_watch)
    sys.exit(_watch.exit_code)


def interrupted() -> bool:
    """Whether this process was told to stop. Exceptions after that are its consequences."""
    return _watch is not None and _watch.told


def allow(seconds: float) -> None:
    """Let ending take this much longer, from now; a second signal ends the process still."""
    if _watch is not None and _watch.told:
        _watch.allow(seconds)


def say_stopped() -> None:
    """MESSAGE on stderr; once a process."""
    if _watch is None or not _watch.said:
        if _watch is not None:
            _watch.said = True
        if _speaks():
            print(f"\n{MESSAGE}", file=sys.stderr, flush=True)


def _speaks() -> bool:
    """One of torchrun's processes is enough to tell."""
    return os.environ.get("RANK", "0") == "0"


def _below_torch(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            return True
        frame = frame.f_back
    return False


def _leave(watch: _Watch) -> NoReturn:
    watch.exit_code = None
    with contextlib.suppress(BaseException):
        say_stopped()
        sys.stdout.flush()
        atexit._run_exitfuncs()
    os._exit(EXIT_INTERRUPTED)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _after(usual: Callable[[Any], Any], quiet: Callable[[Any], bool]) -> Callable[[Any], None]:
    def hook(what: Any) -> None:
        if not quiet(what):
            usual(what)

    return hook
