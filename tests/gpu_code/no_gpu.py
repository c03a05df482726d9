"""The code that `torch.compile` writes for an H100, made and compiled where there is no GPU.

    kernels = gpu_kernels(function, *inputs)
    sizes = launched_kernels(function, *inputs)     of kernels that are the project's own

Tensors are on device "cuda" and have no memory, so that every branch for GPUs is taken; Inductor
writes its Triton kernels of forward and backward, and Triton compiles each down to machine code,
as at a first call on the device. Nothing runs.

`pretend` changes PyTorch for the rest of the process and comes before PyTorch is imported: use a
process of its own (`programs.py`).
"""

import ast
import contextlib
import ctypes
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

CAPABILITY = (9, 0)


def pretend() -> None:
    """Let PyTorch, imported hereafter, see an H100 whose tensors have no memory."""
    os.environ["TRITON_INTERPRET"] = "0"
    _load_device()
    import torch
    import triton
    from torch._subclasses import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block_optin=232448,
        warp_size=32,
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
    )
    torch.version.cuda = "13.0"
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_name = lambda device=None: properties.name
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda._exchange_device = lambda device: 0
    cuda._maybe_exchange_device = lambda device: 0
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device=None: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.autograd.set_multithreading_enabled(False)
    # As where no GPU is seen: constants go to the device as shapes.
    setattr(FakeTensorMode, "avoid_device_init", True)  # noqa: B010 (a property)

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    driver: Any = Driver()
    triton.runtime.driver.set_active(driver)
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = lambda: None  # the driver above stays


def _load_device() -> None:
    spec = find_spec("torch")
    torch = Path(spec.origin).parent if spec and spec.origin else Path()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "no_device.so"
        source = Path(__file__).with_name("no_device.cpp")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", source]
        libraries = torch / "lib"
        command += [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
        subprocess.run([*command, "-o", library], check=True)
        ctypes.CDLL(str(library))


class _Written(Exception):
    """Raised where the compiled program would run."""


@dataclass(frozen=True)
class Written:
    """A program as Inductor wrote it, forward or backward."""

    kernels: dict[str, int]
    """Bytes of machine code of every Triton kernel by name; not those of custom operators."""
    moved: list[tuple[str, int]]
    """What each step of the program does, custom operators and libraries' products too, and the
    bytes that it reads and writes: every buffer once, so no more than that where a cache helps."""

    @property
    def num_bytes(self) -> int:
        """Moved in all."""
        return sum(amount for _, amount in self.moved)


def gpu_kernels(function: Callable[..., Any], *inputs: Any) -> list[Written]:
    """Compile `function` for the GPU as one graph, and its backward where an input needs gradients.

    Returns the forward program and, where there is one, the backward program. Raises what Inductor
    or Triton raise; AssertionError where a program has no kernel.
    """
    import torch
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.graph import GraphLowering
    from torch.utils._python_dispatch import TorchDispatchMode

    class _OnCpu(TorchDispatchMode):
        """Constants that Inductor computes ahead have values, which only the CPU can hold."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)

    sources: list[str] = []
    moved: list[list[tuple[str, int]]] = []

    def write(graph: GraphLowering) -> object:
        sources.append(graph.codegen()[0].value)  # pyright: ignore[reportAttributeAccessIssue]
        moved.append([_step(node) for node in graph.scheduler.nodes])
        return types.SimpleNamespace(call=_run, runner=None)

    def _run(*_: Any) -> None:
        raise _Written

    torch._dynamo.reset()
    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(folder: Any, node: Any) -> Any:
        with _OnCpu():
            return deduce(folder, node)

    settings = {
        "force_disable_caches": True,
        "compile_threads": 1,
        "use_static_triton_launcher": False,
        "shape_padding": False,  # decided by measuring
    }
    with torch._inductor.config.patch(settings):
        with (
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            mock.patch.object(GraphLowering, "compile_to_module", write),
            mock.patch.object(UniformValueConstantFolder, "_deduce_value", deduce_on_cpu),
            contextlib.suppress(_Written),
        ):
            torch.compile(function, dynamic=False, fullgraph=True)(*inputs)
            raise AssertionError("the compiled program ran without its code being taken")
        for source in sources:
            _check_blocks(source)
        programs = [
            Written(
                {name: _machine_code(name, kernel) for name, kernel in _triton_sources(source)},
                steps,
            )
            for source, steps in zip(sources, moved, strict=True)
        ]
    assert programs, "no program was written"
    for number, program in enumerate(programs):
        assert program.kernels, f"program {number} was written without one Triton kernel"
    return programs


def launched_kernels(function: Callable[..., Any], *inputs: Any) -> dict[str, int]:
    """Compile every Triton kernel that `function` launches, without launching it: bytes of its
    machine code, by name. Raises what Triton raises."""
    import torch
    from triton.runtime.jit import JITFunction

    sizes: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(
        kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        if not warmup:  # dtypes stand for tensors there
            args = tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in args)
            return kernel.warmup(*args, grid=grid, **options)
        compiled: Any = run(kernel, *args, grid=grid, warmup=True, **options)
        sizes[kernel.__name__] = len(compiled.asm["cubin"])
        return None

    with mock.patch.object(JITFunction, "run", compile_only):
        function(*inputs)
    return sizes


def _check_blocks(source: str) -> None:
    """AssertionError where FlexAttention would find a sequence's blocks in another's: it counts
    sequences by the stride of the axis of heads, which has length 1 and so may have any stride."""
    strides: dict[str, int] = {}
    for line in re.findall(r"^ *(stride_\w+_(?:blks|idx)_[a-z] = \d+)$", source, re.MULTILINE):
        name, _, stride = line.partition(" = ")
        strides[name] = int(stride)
        if name.endswith(("idx_m", "idx_n")):  # the last of a list, whose rows have this stride
            of_list = name.removesuffix(name[-6:])
            per_list = strides[f"{of_list}_idx_h"]
            wanted = strides[f"{of_list}_num_blks_h"] * strides[name]
            assert per_list == wanted > 0, f"FlexAttention's lists of blocks lie apart: {strides}"


def _step(node: Any) -> tuple[str, int]:
    """The operators that a node of Inductor's schedule was made of, and the bytes that it moves."""
    kernel = getattr(node.node, "python_kernel_name", None)
    origins = {
        str(origin.target).rpartition(".")[0].rpartition(".")[2] or str(origin.target)
        for part in node.get_nodes()
        if part.node is not None
        for origin in part.node.origins
    }
    return kernel or " ".join(sorted(origins)), node.get_read_write_buffers_sizes()


def _triton_sources(program: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton":
            name, source = (ast.literal_eval(argument) for argument in node.args[:2])
            yield name, source


def _machine_code(name: str, source: str) -> int:
    """Compile one kernel in the settings that its first configuration asks for."""
    from torch._inductor.codecache import PyCodeCache

    kernel = getattr(PyCodeCache.load(source), name)
    kernel.configs = kernel.configs[:1]
    kernel.precompile(warm_cache_only=True)
    (result,) = kernel.compile_results
    return len(result.kernel.asm["cubin"])
