"""Child processes of a benchmark: each in a time box, its output in a log, none left behind."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
"""NVLink multicast stays off: a program that ends badly while it uses it can leave the GPUs of a
host unusable for others."""
GRACE_SECONDS = 40.0
"""From asking a child to end until it is killed; torchrun gives its workers 30 s."""
TAIL_LINES = 15


@dataclass(frozen=True)
class End:
    """How a child ended."""

    status: Literal["done", "failed", "time ran out", "ended early"]
    """ended early: by itself, before what was to be done to it could be done."""
    seconds: float
    exit_code: int | None
    log: Path

    def last_lines(self, number: int = TAIL_LINES) -> list[str]:
        """The end of its output."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-number:]


class Child:
    """A process at work, its output going to a log."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        environment: dict[str, str],
        folder: Path | None = None,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._output: IO[str] = log.open("w", encoding="utf-8")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> End | None:
        """Until it ends, at most `seconds` from its start; then it is stopped. With `until`, None
        as soon as that holds."""
        try:
            while self.process.poll() is None:
                if until is not None and until():
                    return None
                if time.monotonic() - self.began > seconds:
                    self.stop()
                    return self._end("time ran out")
                time.sleep(0.02)
        except BaseException:  # this process is to end: the child must not outlive it
            self.stop()
            raise
        if until is not None and self.process.returncode == 0:
            return self._end("ended early")
        return self._end("failed" if self.process.returncode else "done")

    def stop(self) -> None:
        """End it and all that it started: asked first, killed after GRACE_SECONDS."""
        family = [self.process.pid, *descendants(self.process.pid)]
        _signal(self.process.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            family += [pid for pid in descendants(self.process.pid) if pid not in family]
            time.sleep(0.1)
        for pid in reversed(family):
            _signal(pid, signal.SIGKILL)
        self.process.wait()

    def _end(self, status: Literal["done", "failed", "time ran out", "ended early"]) -> End:
        self._output.close()
        seconds = time.monotonic() - self.began
        return End(status, seconds, self.process.returncode, self.log)


def end_with_children() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that it stops its children first."""

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def run(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    seconds: float,
    folder: Path | None = None,
) -> End:
    """A child from start to end, in a folder if one is given."""
    end = Child(command, log, environment, folder).wait(seconds)
    assert end is not None
    return end


def kill(pid: int) -> bool:
    """End a process as a crash would; False if it was gone."""
    return _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _stat(pid: int) -> tuple[int, str] | None:
    """Parent and state of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return int(parent), state


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs, parents first (Linux)."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (found := _stat(int(folder.name))) and found[1] != "Z":
            parents[int(folder.name)] = found[0]
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family[1:]


def _words(pid: int, what: str) -> Iterator[str]:
    try:
        content = Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return
    yield from content.decode(errors="replace").split("\0")


def torchrun_worker(pid: int, rank: int) -> int | None:
    """The process of a rank under a torchrun; None if it is not there (yet)."""
    for worker in descendants(pid):
        found = _stat(worker)
        # Its own children, the compiler's for instance, have its environment.
        if found and found[0] == pid and f"RANK={rank}" in _words(worker, "environ"):
            return worker
    return None


def ray_worker(pid: int, titles: tuple[str, ...]) -> int | None:
    """A process of a Ray cluster that is at work under one of these titles; None if none is. Only
    clusters that `pid` itself started are looked through."""
    for worker in descendants(pid):
        title = next(_words(worker, "cmdline"), "")
        if title.startswith(titles):
            return worker
    return None
