"""One Chromium for all tests that need a browser."""

import os
from collections.abc import Iterator

import pytest
from browser import Browser, Page, chromium, find_chromium


@pytest.fixture(scope="session")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_chromium() is None and not os.environ.get("CI"):
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(_browser: Browser) -> Iterator[Page]:
    """A page that asked no network for anything and reported no problem, or the test fails."""
    with _browser.page() as page:
        yield page
        assert page.requests == []
        assert page.problems == []
