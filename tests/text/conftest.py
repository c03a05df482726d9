"""Prepared text that tests share."""

import shutil
from pathlib import Path

import pytest

from recallzoo.text import TokenData, open_data
from tests.text.little import made


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    made(folder)
    return folder


@pytest.fixture
def data(finished, tmp_path) -> TokenData:
    """A copy to damage."""
    shutil.copytree(finished, tmp_path / "data")
    shutil.copy(finished.parent / "corpus.jsonl", tmp_path / "corpus.jsonl")
    return open_data(tmp_path / "data")
