"""numba's compiler as the CPU kernels use it: it compiles a kernel once on a machine, then reads it from a cache.

The cache is numba's: `NUMBA_CACHE_DIR` if that is set; else `__pycache__` beside the source; else, if the installation
is read-only, the user's cache folder. If none of these is writable, each process compiles the kernels again (some
seconds), and a warning says so.

numba checks only a kernel's own file to see whether the cache is still valid: if you change a kernel that another file
calls, touch that file too. The bodies of parallel loops are separate functions, which compile in half the time.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numba
import torch

FLOATS_MAY_BE_REORDERED = {"reassoc", "contract", "arcp", "nsz"}
"""What vectorised sums need. Not "nnan" and "ninf": a NaN must stay NaN, so that it shows in the loss."""


def compiled(*, parallel: bool = False, reorder: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a kernel.

    Args:
        parallel: distribute `numba.prange` loops over threads.
        reorder: allow sums in another order (fixed at compile time), which vector units need.
    """
    options = {"parallel": parallel, "nogil": True, "error_model": "numpy",
               "fastmath": FLOATS_MAY_BE_REORDERED if reorder else False}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel: Callable[..., Any] = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # what numba raises if it finds no folder for its cache
            warnings.warn("there is no folder for compiled kernels: they are compiled in each process, which takes "
                          "some seconds; set NUMBA_CACHE_DIR to a writable folder", stacklevel=2)
            kernel = numba.njit(**options)(function)
        return kernel

    return decorate


def call(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Call a kernel with tensors passed as arrays, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    result = kernel(*(value.numpy() if isinstance(value, torch.Tensor) else value for value in arguments))
    if torch.get_num_threads() != threads:  # numba shares torch's OpenMP, and sets its threads when it starts
        torch.set_num_threads(threads)
    return result
