"""What tests of pretraining share."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus, which no test may change."""
    from pretraining import small_data  # imports recallzoo, which a shape-checked pass does later

    return small_data(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="session", autouse=True)
def _count_operations_of_a_model_once() -> Iterator[None]:
    """They are counted when a run starts, which takes longer than the few steps of most here."""
    from recallzoo.train import pretrain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "flops_per_token", functools.cache(pretrain.flops_per_token))
        yield
