"""Fixtures of the release stage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from olmoscope.release.build import build_release
from release_runs import make_out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors here are tiny, so threads would only wait for each other, especially on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's output folder, evaluated but not yet exported; read-only."""
    return make_out(tmp_path_factory.mktemp("evaluated") / "out")


@pytest.fixture(scope="session")
def built(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its release; read-only."""
    out = shutil.copytree(evaluated, tmp_path_factory.mktemp("built") / "out")
    build_release(out)
    return out


@pytest.fixture
def out(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of `evaluated` that a test may change."""
    return shutil.copytree(evaluated, tmp_path / "out")


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` that a test may change."""
    return shutil.copytree(built, tmp_path / "copy")
