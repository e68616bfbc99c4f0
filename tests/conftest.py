"""Fixtures for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_endpoint import HubEndpoint

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real tokenizer and documents beside the repository; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data: {SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture
def hub_endpoint() -> Iterator[HubEndpoint]:
    """A hub on this machine (hub_endpoint.py says how to use it)."""
    with HubEndpoint() as hub:
        yield hub
