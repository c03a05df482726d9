"""Does a fast path work here? Each probe tries it, on something tiny.

A probe returns what it saw, and raises what went wrong; `doctor` turns either into a line.
"""

import functools
import importlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recallzoo.heap import CHOSEN_BY_USER, LARGEST_KEPT, keep_freed_memory
from recallzoo.variables import environment_with

CUDA_MISSING = "needs an NVIDIA GPU; PyTorch sees none here"


@dataclass(frozen=True)
class Finding:
    """The outcome of one probe."""

    name: str
    works: bool
    detail: str
    """What was seen, or why it does not work."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Unavailable(Exception):
    """Why a fast path cannot be used here."""


def probe(name: str, function: Callable[[], str]) -> Finding:
    """Run one probe."""
    try:
        with _quiet():
            return Finding(name, True, function())
    except Unavailable as reason:
        return Finding(name, False, str(reason))
    except Exception as error:  # noqa: BLE001 (whatever a driver raises is the finding)
        first_line = str(error).strip().partition("\n")[0]
        return Finding(name, False, f"{type(error).__name__}: {first_line}"[:300])


def all_probes() -> Iterator[tuple[str, Callable[[], str]]]:
    """Every fast path by name; the first is what nothing works without."""
    yield "core: train a tiny model on the CPU", core
    yield "freed memory stays with the process", freed_memory
    for device, name in (("cpu", "the CPU"), ("cuda", "CUDA")):
        yield f"bf16 matrix product on {name}", functools.partial(bf16_product, device)
        yield f"torch.compile on {name}", functools.partial(compiles, device)
    yield "CUDA graph", cuda_graph
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        yield f"fused attention on CUDA: {backend}", functools.partial(fused, backend)
    yield "Triton kernel", triton_kernel
    yield "flash-linear-attention", flash_linear_attention
    yield "packs at once on a GPU: Multi-Process Service", device_sharing


def core() -> str:
    """Train the smallest run there is. If this fails, nothing else matters."""
    from recallzoo.mixers import mixer
    from recallzoo.model import ModelConfig
    from recallzoo.run import Budget, Run
    from recallzoo.tasks import Data, task
    from recallzoo.train.packed import Pack

    started = time.monotonic()
    run = Run(
        data=Data.of(
            task("mqar", seq_len=8, num_pairs=1, vocab_size=64), train=64, valid=8, test=8
        ),
        model=ModelConfig(mixers=(mixer("attention"),), d_model=8, num_layers=1),
        budget=Budget(num_epochs=1, batch_size=32),
    )
    (result,) = Pack([run], "cpu").train()
    if result.status == "diverged":
        raise RuntimeError("the loss is not finite")
    return f"{result.steps} steps in {time.monotonic() - started:.1f} s"


def freed_memory() -> str:
    """Ask the C library to keep what is freed, as every command does."""
    if not keep_freed_memory():
        raise Unavailable(
            f"the C library is not glibc, or the environment says how it is to allocate "
            f"({', '.join(CHOSEN_BY_USER)}): training on a CPU may take half as long again"
        )
    return f"blocks of up to {LARGEST_KEPT[0] // 2**20} MiB"


def compiles(device: str) -> str:
    """Compile and run a small function."""
    _require_cuda(device)

    def function(x: Tensor) -> Tensor:
        return torch.sin(x) * 2 + x

    x = torch.arange(8.0, device=device)
    started = time.monotonic()
    torch._dynamo.reset()
    # a folder of its own: a compiler that is broken now must not be hidden by an earlier cache
    with tempfile.TemporaryDirectory() as cache, environment_with(TORCHINDUCTOR_CACHE_DIR=cache):
        compiled = torch.compile(function)(x)
    if not torch.allclose(compiled, function(x), atol=1e-5):
        raise RuntimeError("the compiled function gives other numbers")
    return f"{time.monotonic() - started:.1f} s"


def cuda_graph() -> str:
    """Capture a product once and replay it on other numbers."""
    _require_cuda("cuda")
    x, out = torch.ones(16, 16, device="cuda"), torch.zeros(16, 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out.copy_(x @ x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(x @ x)
    x.fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    if out[0, 0].item() != 64.0:
        raise RuntimeError("a replayed graph gave old numbers")
    return "captured and replayed"


def bf16_product(device: str) -> str:
    """Multiply in bfloat16 and compare with float32; report the speed of both."""
    _require_cuda(device)
    size = 4096 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    low = a.bfloat16()
    error = ((low @ low).float() - a @ a).abs().max().item() / size**0.5
    if not error < 0.1:
        raise RuntimeError(f"relative error {error:.2g}")
    fast, slow = _seconds(lambda: low @ low, device), _seconds(lambda: a @ a, device)
    return f"{2 * size**3 / fast / 1e12:.3g} TFLOP/s (fp32: {2 * size**3 / slow / 1e12:.3g})"


def fused(backend: str) -> str:
    """Attention by one named backend alone."""
    _require_cuda("cuda")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(2, 2, 128, 64, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        fast = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with sdpa_kernel([SDPBackend.MATH]):
        plain = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    if not torch.allclose(fast, plain, atol=3e-2):
        raise RuntimeError("its output differs from the plain one")
    return "agrees with the plain one"


def triton_kernel() -> str:
    """Import Triton, and compile and run a kernel with it."""
    triton = _import("triton", "the CPU build of PyTorch comes without it")
    _require_cuda("cuda")
    from torch.utils._triton import has_triton

    if not has_triton():
        raise Unavailable("PyTorch says that Triton does not support this GPU")
    from recallzoo.cli._triton_probe import doubled

    x = torch.arange(64.0, device="cuda")
    if not torch.equal(doubled(x), x * 2):
        raise RuntimeError("the kernel gives other numbers")
    return f"Triton {triton.__version__}"


def flash_linear_attention() -> str:
    """Import flash-linear-attention."""
    fla = _import("fla", "install it with: pip install 'recallzoo[fla]'")
    _require_cuda("cuda")
    return f"version {getattr(fla, '__version__', 'unknown')}"


def device_sharing() -> str:
    """Start the service through which processes use a GPU at once, and end it."""
    _require_cuda("cuda")
    from recallzoo.executors._mps import NoService, is_running, mps

    if is_running():
        return "one that somebody else started runs here, and would be used"
    try:
        with mps():
            return "starts, and a GPU answers through it"
    except NoService as reason:
        raise Unavailable(str(reason)) from reason


def _import(module: str, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise Unavailable(f"not installed; {hint}") from error


def _require_cuda(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        why = "" if torch.version.cuda else " (this build of PyTorch is for the CPU alone)"
        raise Unavailable(CUDA_MISSING + why)


def _seconds(function: Callable[[], Any], device: str) -> float:
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(5):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / 5


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a compiler's own warnings out of the findings."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def free_gigabytes(folder: Path) -> float:
    """Space left where a folder is, in GB."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize / 1e9
