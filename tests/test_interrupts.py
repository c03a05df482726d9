"""A command that is told to stop ends soon, with one message and one exit code; none aborts."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from recallzoo.interrupts import EXIT_INTERRUPTED, MESSAGE, STUCK_SECONDS

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
SLEEP = """
def main():
    print("ready", flush=True)
    time.sleep(60)
"""


def ending(*lines: str) -> str:
    """A command that does this when it is told to stop."""
    return f"""
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        {"; ".join(lines)}
"""


class Command:
    """Python source with a `main`, run as `recallzoo` runs its own; ready once it says so."""

    def __init__(self, source: str, **options) -> None:
        before = "import ctypes, os, signal, sys, threading, time\n"
        after = "\nfrom recallzoo.interrupts import run_process\nrun_process(main)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", before + textwrap.dedent(source) + after],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self, *numbers: signal.Signals, seconds: float = 5.0) -> tuple[int, str, str]:
        """Send the signals half a second apart. The exit code, and what it says from then on."""
        for position, number in enumerate(numbers):
            time.sleep(0.5 if position else 0.0)
            self.process.send_signal(number)
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


STOPPED = (EXIT_INTERRUPTED, "", f"\n{MESSAGE}\n")


@BOTH
def test_a_signal_ends_a_command_with_one_message(number):
    assert Command(SLEEP).end(number) == STOPPED


@BOTH
def test_what_is_under_way_ends_in_order(number):
    command = Command(ending("print('tidied up')"))
    assert command.end(number) == (EXIT_INTERRUPTED, "tidied up\n", f"\n{MESSAGE}\n")


@BOTH
def test_a_second_signal_ends_a_command_that_is_still_ending(number):
    command = Command(ending("time.sleep(60)"))
    assert command.end(number, number, seconds=2.0) == STOPPED


def test_two_signals_at_once_are_one():
    command = Command(ending("time.sleep(0.5)", "print('tidied up')"))
    command.process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    assert command.end(signal.SIGTERM) == (EXIT_INTERRUPTED, "tidied up\n", f"\n{MESSAGE}\n")


@pytest.mark.parametrize("becomes", ["ImportError('numpy')", "SystemExit(15)"])
def test_an_interruption_that_a_library_turns_into_another_error_is_one_still(becomes):
    command = Command(
        f"""
        def main():
            try:
                print("ready", flush=True)
                time.sleep(60)
            except KeyboardInterrupt as error:
                raise {becomes} from error
        """
    )
    assert command.end(signal.SIGINT) == STOPPED


def test_an_interruption_in_a_finaliser_which_python_drops_ends_the_command():
    command = Command(
        """
        class Held:
            def __del__(self):
                print("ready", flush=True)
                time.sleep(60)

        def main():
            held = Held()
            del held
            time.sleep(60)
        """
    )
    assert command.end(signal.SIGINT) == STOPPED


def test_a_command_that_does_not_return_from_c_ends_soon():
    command = Command(
        """
        def main():
            mutex = ctypes.create_string_buffer(256)
            print("ready", flush=True)
            for _ in range(2):  # the second one waits for ever, whatever signals come
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
        """
    )
    assert command.end(signal.SIGINT, seconds=STUCK_SECONDS + 3) == STOPPED


def test_nothing_is_raised_below_pytorch_which_would_abort():
    command = Command(
        """
        import torch

        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, gradient):
                print("ready", flush=True)
                time.sleep(1.0)
                print("backward was left alone", flush=True)
                return 2 * gradient

        def main():
            x = torch.ones(3, requires_grad=True)
            Twice.apply(x).sum().backward()
            time.sleep(60)
        """
    )
    code, out, err = command.end(signal.SIGINT)
    assert (code, out, err) == (EXIT_INTERRUPTED, "backward was left alone\n", f"\n{MESSAGE}\n")


def test_an_interrupted_process_does_not_take_down_what_would_abort():
    command = Command(
        """
        libc = ctypes.CDLL(None)
        libc.on_exit(libc.abort, None)  # as destructors of libraries in C++ that meet live threads

        def main():
            print("ready", flush=True)
            time.sleep(60)
        """
    )
    assert command.end(signal.SIGINT) == STOPPED


def test_background_threads_that_fail_for_an_interruption_say_nothing():
    command = Command(
        """
        stop = threading.Event()

        def work():
            stop.wait()
            raise RuntimeError("the group is gone")

        def main():
            thread = threading.Thread(target=work)
            thread.start()
            try:
                print("ready", flush=True)
                time.sleep(60)
            finally:
                stop.set()
                thread.join()
        """
    )
    assert command.end(signal.SIGINT) == STOPPED


def test_a_signal_after_the_work_does_not_change_its_exit_code():
    command = Command(
        """
        def main():
            threading.Thread(target=time.sleep, args=(60,)).start()
            threading.Timer(0.5, print, ("ready",), {"flush": True}).start()
            return 2
        """
    )
    assert command.end(signal.SIGINT) == (2, "", "")


def test_a_signal_to_a_forked_child_leaves_the_command_alone():
    command = Command(
        """
        def main():
            child = os.fork()
            if not child:
                time.sleep(60)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.5)
            print("ready", flush=True)
            return 0
        """
    )
    assert command.end() == (0, "", "")


def test_ctrl_c_stays_ignored_where_it_was():
    command = Command(
        """
        def main():
            print("ready", flush=True)
            time.sleep(1.0)
            return 0
        """,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert command.end(signal.SIGINT) == (0, "", "")


def test_one_process_of_torchruns_tells():
    environment = {**os.environ, "RANK": "1"}
    assert Command(SLEEP, env=environment).end(signal.SIGTERM) == (EXIT_INTERRUPTED, "", "")


def test_a_bug_shows_its_traceback_as_ever():
    command = Command(
        """
        def main():
            print("ready", flush=True)
            raise TypeError("ours")
        """
    )
    code, _, err = command.end()
    assert code == 1
    assert "TypeError: ours" in err
