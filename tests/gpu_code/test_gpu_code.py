"""What `torch.compile` writes for a GPU compiles: seen without one."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recallzoo.train._compiling import OPERATORS_OF_LAYER, PASSES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.unchecked,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or shutil.which("g++") is None,
        reason="needs Triton and g++",
    ),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="PyTorch with CUDA: the compiler is tried on a GPU"
    ),
]

COMPILING = {
    "draws": 2,
    "rows": 2,
    "rows-valid": 1,
    "embedding": 6,
    "block/lookup_attention/3": 2,
}
"""Those that find most for their time, with their programs: forward and, in training, backward; of
`embedding`, widths and precisions. `programs.py` knows all others."""
PLAIN = "plain/rwkv4-64-64"
BROKEN = ("broken/addresses", "broken/no-kernel")
PROGRAMS = Path(__file__).with_name("programs.py")


def compile_for_gpu(*names: str) -> dict[str, dict[str, Any]]:
    """What `programs.py` prints, by name."""
    command = [sys.executable, str(PROGRAMS), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 1, done.stderr  # as the broken ones do not compile
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_kernels_of_the_compiler_compile_for_a_gpu_and_what_does_not_is_told():
    # One test, as a process takes longer to start than some programs to compile.
    lines = compile_for_gpu(*COMPILING, PLAIN, *BROKEN)
    assert list(lines) == [*COMPILING, PLAIN, *BROKEN]
    assert "out of range for type int32" in lines["broken/addresses"]["error"]
    assert "without one Triton kernel" in lines["broken/no-kernel"]["error"]
    wrong = {name: lines[name]["error"] for name in COMPILING if "error" in lines[name]}
    assert not wrong
    assert {name: len(lines[name]["kernels"]) for name in COMPILING} == COMPILING
    layers = 2
    assert sum(lines[PLAIN]["passes"]) == pytest.approx(layers * PASSES, rel=0.5)
    assert sum(lines[PLAIN]["operators"]) == pytest.approx(layers * OPERATORS_OF_LAYER, rel=0.5)
    assert set(lines["embedding"]["kernels"]) == {3}  # vectors; sums of blocks, and of their parts
