"""Scripts that stand for NVIDIA's Multi-Process Service and for a GPU behind it: CI has neither."""

import os
import sys
from pathlib import Path

import pytest

from recallzoo.executors import _mps
from recallzoo.executors._mps import CONTROL, DEVICES, PIPES

SERVICE = """#!{python}
import os, pathlib, sys, time
pipes, log = (pathlib.Path(os.environ[n]) for n in ("{pipes}", "CUDA_MPS_LOG_DIRECTORY"))
if sys.argv[1:] == ["-f"]:
    print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), file=open(log / "control.log", "w"))
    (pipes / "control_lock").touch()
    time.sleep(0.2)
    (pipes / "control").touch()
    while not (pipes / "quit").exists():
        time.sleep(0.02)
    time.sleep(float(os.environ.get("QUIT_SECONDS", "0")))
elif sys.stdin.read().startswith("quit"):
    (pipes / "quit").touch()
"""
ANSWERS = f"""
import os, sys
sys.exit(not os.path.exists(os.path.join(os.environ["{PIPES}"], "control")))
"""
FAILS = "import sys; sys.exit('CUDA error 805')"


def put_on_path(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The script, with nothing of another service in the environment."""
    path = folder / "bin" / CONTROL
    path.parent.mkdir()
    path.write_text(SERVICE.format(python=sys.executable, pipes=PIPES))
    path.chmod(0o755)
    patch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    for name in (PIPES, DEVICES, "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        patch.delenv(name, raising=False)
    patch.setattr(_mps, "DEFAULT_PIPES", folder / "none")
    patch.setattr(_mps, "_TRY", ANSWERS)
    return path


def number_of_services(path: Path) -> int:
    """Processes of this script that run."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += str(path).encode() in (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
    return found
