"""The process of a command: `recallzoo`, or `python -m recallzoo`."""

from typing import NoReturn

from recallzoo.heap import keep_freed_memory
from recallzoo.interrupts import run_process


def start() -> NoReturn:
    """Run the command line and end this process."""
    run_process(_main)


def _main() -> int:
    keep_freed_memory()
    # Imported when signals are looked after already.
    from recallzoo.cli import main

    return main()


if __name__ == "__main__":
    start()
