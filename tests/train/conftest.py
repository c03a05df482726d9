"""What tests of pretraining share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus, which no test may change."""
    from pretraining import small_data  # imports recallzoo, which a shape-checked pass does later

    return small_data(tmp_path_factory.mktemp("data") / "small")
