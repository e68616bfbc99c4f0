"""numba's compiler as the CPU kernels use it: compiled once for a machine, then read from a cache.

The cache is numba's: `NUMBA_CACHE_DIR` where that is set; else `__pycache__` beside the source; else, in an
installation that cannot be written, the user's cache folder. Where none can be written, kernels are compiled anew in
each process (some seconds), and a warning says so.

numba looks only at the file of a kernel to see whether the cache is still right: whoever changes a kernel that
another file calls must touch that file too. Bodies of parallel loops are functions of their own, which compile in
half the time.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numba
import torch

FLOATS_MAY_BE_REORDERED = {"reassoc", "contract", "arcp", "nsz"}
"""What vectorised sums need. Not "nnan" and "ninf": a NaN must stay one, to be seen in the loss."""


def compiled(*, parallel: bool = False, reorder: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a kernel.

    Args:
        parallel: `numba.prange` loops are shared out among threads.
        reorder: sums may be taken in another order (fixed when compiled), as vector units like it.
    """
    options = {"parallel": parallel, "nogil": True, "error_model": "numpy",
               "fastmath": FLOATS_MAY_BE_REORDERED if reorder else False}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel: Callable[..., Any] = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # what numba raises where it finds no folder for its cache
            warnings.warn("there is no folder for compiled kernels: they are compiled in each process, which takes "
                          "some seconds; set NUMBA_CACHE_DIR to a folder that can be written", stacklevel=2)
            kernel = numba.njit(**options)(function)
        return kernel

    return decorate


def call(kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Call a kernel with tensors as the arrays that they are, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    result = kernel(*(value.numpy() if isinstance(value, torch.Tensor) else value for value in arguments))
    if torch.get_num_threads() != threads:  # numba shares torch's OpenMP, and sets its threads when it starts
        torch.set_num_threads(threads)
    return result
