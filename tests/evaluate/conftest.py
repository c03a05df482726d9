"""Models and data that the tests of the audit share."""

from pathlib import Path

import pytest

from recallzoo.evaluate.audit_store import Audit
from recallzoo.text import TokenData, open_data
from tests.evaluate.auditing import run
from tests.evaluate.making import make_byte_tokenizer, make_data, make_model


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """data, and models a and b (its tokenizer) and bytes (another one)."""
    folder = tmp_path_factory.mktemp("audit")
    data = make_data(folder / "data")
    make_model(folder / "a", data.tokenizer_folder, 1)
    make_model(folder / "b", data.tokenizer_folder, 2, kind="llama")
    make_model(folder / "bytes", make_byte_tokenizer(folder / "byte_tokenizer"), 3)
    return folder


@pytest.fixture(scope="module")
def data(here) -> TokenData:
    return open_data(here / "data")


@pytest.fixture(scope="module")
def compared(here, tmp_path_factory) -> Audit:
    """a against b."""
    return run(here, tmp_path_factory.mktemp("out") / "out", reference=(str(here / "b"),))
