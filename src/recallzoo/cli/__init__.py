"""The command line. One module a command; adding a command is adding a file.

A command is a module of `commands/` with `main(argv) -> int`. The first line of its docstring
is its summary, the whole docstring its help. A module is imported only when its
command is called, so that help does not wait for PyTorch.
"""

import ast
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from recallzoo._version import __version__
from recallzoo.errors import RecallzooError, UnknownName, UserError
from recallzoo.interrupts import EXIT_INTERRUPTED, interrupted, say_stopped

EXIT_BROKEN_PIPE = 141
_ABOUT_PATHS = {
    errno.ENAMETOOLONG: "is longer than the file system allows. Give a shorter one.",
    errno.EACCES: "is closed to you: no permission. Change its permissions or name another.",
}
"""What is wrong with a path, wherever it is first looked at."""

EXAMPLES = """\
examples:
  recallzoo run quickstart                        train attention and a gated convolution, 3 minutes
  recallzoo report runs/quickstart                write the charts as one HTML file
  recallzoo run --mixer my_mixer.py:MyMixer       check and train a mixer of your own
  recallzoo run figure2 --help                    what a recipe lets you choose
  recallzoo list mixers                           mixers and their options
"""


def known_commands() -> dict[str, str]:
    """Command -> summary, read from source."""
    found = {}
    for path in sorted((Path(__file__).parent / "commands").glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = docstring.partition("\n")[0]
    return found


def usage() -> str:
    """What `recallzoo --help` prints."""
    known = known_commands()
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in known.items()]
    return "\n".join(
        [
            "usage: recallzoo COMMAND [OPTIONS]",
            "",
            "Can a sequence mixer recall, where does a language model lose for lack of recall, and",
            "what closes the gap?",
            "",
            "commands:",
            *lines,
            "",
            "Each command explains itself: recallzoo COMMAND --help. --version prints the version.",
            "",
            EXAMPLES.rstrip(),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code.

    0 done; 1 the work could not be finished; 2 the user's mistake; 75 the time of `run --minutes`
    is over and runs are left; 130 stopped by Ctrl-C or SIGTERM.
    """
    try:
        return _exit_code(list(sys.argv[1:] if argv is None else argv))
    except BaseException as error:
        if not (isinstance(error, KeyboardInterrupt) or interrupted()):
            raise
        say_stopped()
        return EXIT_INTERRUPTED


def _exit_code(argv: list[str]) -> int:
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
    except SystemExit as stop:
        if interrupted():  # Ray's answer to SIGTERM
            raise
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        # Python flushes stdout again when it exits and would complain about the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except RecallzooError as error:
        if interrupted():  # whatever failed for that
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        about = _ABOUT_PATHS.get(error.errno or 0)
        if about is None or error.filename is None:
            raise
        print(f"error: {error.filename} {about}", file=sys.stderr)
        return UserError.exit_code
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"recallzoo {__version__}")
        return 0
    known = known_commands()
    if argv[0] not in known:
        raise UnknownName("command", argv[0], known)
    command = importlib.import_module(f"{__name__}.commands.{argv[0]}")
    return command.main(argv[1:])
