"""Devices by name."""

import torch

from recallzoo.errors import UserError

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
)
"""What a RuntimeError says where memory ran out below PyTorch's own allocator for CUDA."""


def choose_device(name: str) -> torch.device:
    """The device that a name stands for. UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown. Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices here. Use --device cpu, or run "
            f"`recallzoo doctor` to see why."
        )
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, on any device.

    PyTorch has a class for this on CUDA alone, torch.OutOfMemoryError. On the CPU, and where a
    library of CUDA allocates by itself, it raises RuntimeError and only the text tells; NumPy and
    Python raise MemoryError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


SLOW_BFLOAT16 = (
    "this CPU has no bfloat16 products: they are emulated, which takes many times as long as "
    "float32. Choose --precision fp32"
)


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products there are slower than float32 ones, as on CPUs without them."""
    if device.type != "cpu":
        return False
    operators = torch.ops.mkldnn
    return not (torch.backends.mkldnn.is_available() and operators._is_mkldnn_bf16_supported())
