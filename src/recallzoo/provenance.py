"""Where a number came from: versions, commit, machine."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from recallzoo._version import __version__

PACKAGES = ("torch", "triton", "numpy", "polars", "flash-linear-attention")


def version_of(package: str) -> str | None:
    """Installed version of a distribution, None if absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def commit() -> str | None:
    """Commit of the source tree that recallzoo runs from, `+changes` if it differs. Where git
    cannot tell, what RECALLZOO_COMMIT says (for copies on other machines), or None (an installed
    wheel is named by its version)."""
    folder = Path(__file__).resolve().parents[2]
    told = os.environ.get("RECALLZOO_COMMIT")
    if not (folder / ".git").exists():
        return told

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return told


def environment() -> dict[str, Any]:
    """Versions, commit and platform of this process."""
    return {
        "recallzoo": __version__,
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
        "commit": commit(),
        "platform": platform.platform(),
    }
