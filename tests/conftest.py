"""Settings for every test: reproducible hypothesis, one thread a worker."""

import os

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")
torch.set_num_threads(1)
os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined
