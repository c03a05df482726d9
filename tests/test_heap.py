"""Memory that is freed stays with the process, unless the environment says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from recallzoo.heap import CHOSEN_BY_USER

PAGES = 8 * 5 * 24 * 2**20 // os.sysconf("SC_PAGE_SIZE")
FAULTS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):  # more at once than glibc by default keeps
        blocks = [libc.malloc(24 * 2**20) for _ in range(5)]
        for block in blocks:
            ctypes.memset(block, 1, 24 * 2**20)
        for block in blocks:
            libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return 0
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def printed(code: str, **variables: str) -> str:
    """What Python prints where only these variables say how memory is taken."""
    environment = {name: v for name, v in os.environ.items() if name not in CHOSEN_BY_USER}
    command = [sys.executable, "-c", FAULTS + code]
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    ).stdout


def test_what_is_freed_is_not_taken_from_the_system_again():
    before = int(printed("faults()"))
    after = int(printed("from recallzoo.heap import *\nkeep_freed_memory()\nfaults()"))
    assert before > PAGES * 0.9
    assert after < PAGES * 0.2  # the first of eight, and what glibc adds


def test_every_command_keeps_it():
    command = "import recallzoo.__main__ as m, recallzoo.cli as c\nc.main = faults\nm.start()"
    assert int(printed(command)) < PAGES * 0.2


def test_workers_of_a_cluster_keep_it():
    worker = (
        "from recallzoo.executors._worker import PackWorker, WorkerOptions\n"
        "PackWorker(WorkerOptions(folder='', device='cpu', compiled=None, checkpoint_seconds=0.0,\n"
        "    packs_per_device=1, most_devices=None, version=''), None)\nfaults()"
    )
    assert int(printed(worker)) < PAGES * 0.2


@pytest.mark.parametrize("name", CHOSEN_BY_USER)
def test_what_the_environment_says_of_memory_is_left_as_it_is(name):
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    code = "from recallzoo.heap import *\nprint(keep_freed_memory())\nfaults()"
    kept, faults = printed(code, **{name: value}).split()
    assert kept == "False"
    assert int(faults) > PAGES * 0.9
