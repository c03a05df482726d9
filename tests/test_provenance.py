"""Every result says which code and which versions made it."""

import json
import subprocess

import pytest
import torch

from recallzoo import __version__, provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout of its own, as whose source tree the package is taken."""
    source = tmp_path / "src" / "recallzoo" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(source))
    provenance.commit.cache_clear()
    yield tmp_path
    provenance.commit.cache_clear()


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_clean_checkout_is_named_by_its_commit_and_a_changed_one_says_so(checkout):
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "one")
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance.commit() == head
    provenance.commit.cache_clear()
    (checkout / "notes.txt").write_text("no source")
    assert provenance.commit() == head
    provenance.commit.cache_clear()
    (checkout / "src" / "recallzoo" / "provenance.py").write_text("x = 2\n")
    assert provenance.commit() == f"{head}+changes"


def test_outside_of_a_checkout_or_without_git_there_is_no_commit(checkout, monkeypatch):
    assert provenance.commit() is None
    (checkout / ".git").mkdir()
    provenance.commit.cache_clear()
    assert provenance.commit() is None, "a damaged checkout"
    monkeypatch.setenv("PATH", "")
    provenance.commit.cache_clear()
    assert provenance.commit() is None


def test_the_environment_is_plain_json_with_versions():
    environment = provenance.environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["recallzoo"] == __version__
    assert torch.__version__.startswith(environment["torch"].partition("+")[0])
    assert provenance.version_of("a-distribution-that-nobody-has") is None
