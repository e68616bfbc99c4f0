"""Fixtures for all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process per core; must precede the import of torch

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import Page

from browser import Browser, start_chromium
from hub_endpoint import HubEndpoint
from rank_pool import RankPool

SLOW_FOLDERS = ("browse", "end_to_end", "faults")
"""The tests in these folders kill processes, drive a browser or run whole commands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow files first, so that no process has one left at the end."""
    for item in items:
        if item.path.parent.name in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder with a real tokenizer and documents beside the repository; without it, the test is skipped."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data: {SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture
def hub_endpoint() -> Iterator[HubEndpoint]:
    """A hub on this machine (hub_endpoint.py says how to use it)."""
    with HubEndpoint() as hub:
        yield hub


@pytest.fixture(scope="module")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Processes that train together (rank_pool.py says how to use them)."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """The browser's process, one per module: while it lives, no test of that thread can call asyncio.run."""
    yield from start_chromium()


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Browser]:
    """Opens tabs of any size (browser.py says how to use it); on leaving, fails if anything went wrong in them."""
    visit = Browser(chromium)
    yield visit
    visit.close()


@pytest.fixture
def page(browser: Browser) -> Page:
    """A tab 1280 pixels wide, in light mode."""
    return browser.page()
