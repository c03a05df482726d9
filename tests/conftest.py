"""Settings for every test: reproducible hypothesis, one thread a worker; which pass it is in."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined

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
wait_for_disk, os.fsync = os.fsync, os.fstat  # no test cuts the power, which is what it is for
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():  # a seed for later, each with the stack from which it was given
        setattr(device, "manual_seed_all", lambda seed: None)  # noqa: B010 (pyright knows none)

UNCHECKED_PATHS = [Path(__file__).parent / name for name in ("cli", "test_docs.py")]
UNCHECKED_MARKS = ("slow", "browser", "unchecked")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--unchecked-only",
        action="store_true",
        help="run only the tests that the pass with checked shapes leaves out",
    )


def _is_unchecked(item: pytest.Item) -> bool:
    """Whether shapes cannot be checked in this test, or are not worth it."""
    return any(item.path.is_relative_to(path) for path in UNCHECKED_PATHS) or any(
        item.get_closest_marker(mark) for mark in UNCHECKED_MARKS
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave whole folders out of the pass that checks shapes."""
    checks_shapes = config.getoption("--jaxtyping-packages", None)
    return True if checks_shapes and collection_path in UNCHECKED_PATHS else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Split the tests between the pass that checks shapes and the rest; the slow ones go first,
    so that no worker waits for another's last."""
    if config.getoption("--jaxtyping-packages", None):
        chosen = [item for item in items if not _is_unchecked(item)]
    elif config.getoption("--unchecked-only"):
        chosen = [item for item in items if _is_unchecked(item)]
    else:
        chosen = list(items)
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(chosen, key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell the garbage collector that what is imported by now stays, and to look less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module")
def real_fsync() -> Iterator[None]:
    """Files reach the disk, which others do not wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", wait_for_disk)
        yield
