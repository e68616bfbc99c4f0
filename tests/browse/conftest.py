"""One small index (512 latents of the tiny model), and one server of it for each test module."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from browse_server import browse_server
from feature_index import small_index


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index's folder, which this module may change."""
    return small_index(tmp_path_factory.mktemp("browse"))


@pytest.fixture(scope="module")
def port(index_folder: Path) -> Iterator[int]:
    """The port of its server."""
    with browse_server(index_folder) as port:
        yield port
