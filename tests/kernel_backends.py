"""Which kernels are under test: `KERNELS_UNDER_TEST` names them, `KERNELS_UNDER_TEST_DEVICE` where they run.

test_triton.py and the GPU day (benchmarks/gpu_kernels.py) run tests again with them.
"""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BACKENDS = os.environ.get("KERNELS_UNDER_TEST", "reference cpu").split()
DEVICE = os.environ.get("KERNELS_UNDER_TEST_DEVICE", "cpu")
SLOW = "cuda" in BACKENDS and DEVICE == "cpu"
"""Triton's interpreter runs a kernel line by line, program by program."""
FEW = "cuda" in BACKENDS
"""A few examples instead of many: on a GPU, Triton compiles each kernel again for nearly every size."""
TESTS = [Path(__file__).parent / name for name in (
    "kernels/test_kernels.py", "kernels/test_parts_of_residual.py", "kernels/test_candidates.py",
    "kernels/test_cuda.py", "train/test_step.py", "train/test_auxiliary.py", "train/test_activation_rules.py")]
"""Files with tests that run with any kernels; these tests have the kernels' name in their own."""


def backend(name: str) -> Iterator[ModuleType]:
    """The body of a fixture: the kernels with this name."""
    module = importlib.import_module(f"olmoscope.kernels.{name}")
    with pytest.MonkeyPatch.context() as patch:
        if SLOW:
            patch.setattr(module, "SHARES", 7)
        yield module
