"""The memory that torch allocates while code runs, from the sizes of its tensors: on a CPU, or for a pretended GPU.

    with Allocations() as seen:
        ...
    seen.peak           most bytes at a time, in tensors made inside

    with pretend_cuda() as device, Allocations() as seen:
        ...             tensors of `device` have shapes and no content; Triton kernels do nothing

Memory that a library or a compiled loop allocates internally is not seen.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages of the tensors that operations return, from their first appearance until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, False)
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._see(tensor, True)
        return out

    def _see(self, tensor: Any, made_here: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if made_here else 0
        self.now += self._known[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


class _Nothing:
    """A Triton kernel that is not run."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


@contextlib.contextmanager
def pretend_cuda() -> Iterator[torch.device]:
    """A CUDA device whose tensors have only shapes."""
    from olmoscope.kernels import cuda_candidates_kernels, cuda_kernels

    with pytest.MonkeyPatch.context() as patch:
        for module in (cuda_kernels, cuda_candidates_kernels):
            for name, value in vars(module).items():
                if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                    patch.setattr(module, name, _Nothing())
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"))
        yield torch.device("meta")
