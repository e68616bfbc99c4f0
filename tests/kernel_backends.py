"""Which kernels are under test: `KERNELS_UNDER_TEST` names them (test_triton.py runs tests again with it)."""

import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import pytest

BACKENDS = os.environ.get("KERNELS_UNDER_TEST", "reference cpu").split()
DEVICE = os.environ.get("KERNELS_UNDER_TEST_DEVICE", "cpu")
SLOW = "cuda" in BACKENDS and DEVICE == "cpu"
"""Triton's interpreter runs a kernel line by line, program by program."""


def backend(name: str) -> Iterator[ModuleType]:
    """The body of a fixture: the kernels of a name."""
    module = importlib.import_module(f"olmoscope.kernels.{name}")
    with pytest.MonkeyPatch.context() as patch:
        if SLOW:
            patch.setattr(module, "SHARES", 7)
        yield module
