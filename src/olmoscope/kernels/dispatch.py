"""Which kernels a tensor gets: numba on a CPU, Triton on a GPU, plain torch elsewhere.

The environment variable `OLMOSCOPE_KERNELS` (`reference`, `cpu` or `cuda`) overrides the choice, for tests and to find
out whether a kernel is to blame. Importing a backend imports its compiler, so it happens on first use.
"""

import importlib
import os
from typing import cast

import torch

from olmoscope.errors import UserError
from olmoscope.kernels.interface import Kernels

VARIABLE = "OLMOSCOPE_KERNELS"
BACKENDS = {"reference": ("cpu", "cuda", "mps", "xpu"), "cpu": ("cpu",), "cuda": ("cuda",)}
"""Each set of kernels and the device types that it runs on."""


def kernels_for(device: torch.device) -> Kernels:
    """The kernels for tensors on a device.

    Raises:
        UserError: `OLMOSCOPE_KERNELS` names unknown kernels, or kernels for another device; or triton is missing.
    """
    name = os.environ.get(VARIABLE) or (device.type if device.type in BACKENDS else "reference")
    if name not in BACKENDS:
        raise UserError(f"{VARIABLE}={name}: there are no such kernels; choose from {', '.join(BACKENDS)}")
    if device.type not in BACKENDS[name]:
        raise UserError(f"{VARIABLE}={name}: these kernels do not run on {device.type}; unset it or choose reference")
    try:
        return cast(Kernels, importlib.import_module(f"olmoscope.kernels.{name}"))
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UserError("the kernels for CUDA need triton, which is not installed (it exists for Linux only): choose "
                        "device: cpu, or run this on the machine with the GPU") from error
