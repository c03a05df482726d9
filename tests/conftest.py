"""Settings for every test: reproducible hypothesis, one thread a worker."""

import os

import pytest
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `unchecked` out of the pass that checks shapes at every call."""
    if config.getoption("--jaxtyping-packages", None):
        checked = [item for item in items if item.get_closest_marker("unchecked") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in checked])
        items[:] = checked
