"""What tests that compute on a GPU are marked with."""

import os

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] != "0",
    reason="needs a GPU, and TRITON_INTERPRET=0: interpreted kernels copy through the host, which "
    "cannot be captured",
)
