"""Devices by name, and what they say when memory runs out."""

import numpy as np
import pytest
import torch

from recallzoo.devices import choose_device, emulates_bfloat16, is_out_of_memory
from recallzoo.errors import UserError

PETABYTE = 2**50


def raised_by(function) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one is what is asked)
        function()
    return caught.value


def test_running_out_of_memory_is_known_on_the_cpu():
    assert is_out_of_memory(raised_by(lambda: torch.empty(PETABYTE)))
    assert is_out_of_memory(raised_by(lambda: np.empty(PETABYTE)))


def test_running_out_of_memory_is_known_on_cuda_and_in_its_libraries():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(cublas))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))


def test_other_errors_are_no_lack_of_memory():
    shapes = raised_by(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))
    assert not is_out_of_memory(shapes)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(UserError("DefaultCPUAllocator: can't allocate memory"))


def test_the_automatic_device_is_there():
    assert choose_device("auto").type in ("cpu", "cuda")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:99"])
def test_a_device_that_is_unknown_or_missing_is_refused(name):
    with pytest.raises(UserError, match=f"device '{name}'"):
        choose_device(name)


def test_bfloat16_is_emulated_where_the_library_of_products_has_none(monkeypatch):
    cpu, library = torch.device("cpu"), torch.ops.mkldnn
    assert not emulates_bfloat16(torch.device("cuda", 0))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for has_products in (True, False):
        monkeypatch.setattr(library, "_is_mkldnn_bf16_supported", lambda has=has_products: has)
        assert emulates_bfloat16(cpu) is not has_products
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert emulates_bfloat16(cpu)
