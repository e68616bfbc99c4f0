"""Which tensors a file holds, from its header: of safetensors, of numpy's npz, of `torch.save`. Nothing is executed.

The tensors themselves are read by `read_tensors`, where they are wanted.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.model_errors import POINTER, damage
from olmoscope.sae.io.torch_file import DAMAGED, load_torch_file

_LONGEST_HEADER = 100_000_000
"""Of a safetensors file, in bytes: the library's own bound."""

_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Its names of the dtypes that weights have."""

_NUMBERS = {"F64": "<d", "F32": "<f"}
"""How single numbers of them are packed."""


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        shapes: of the tensors, by name; of a torch file those in mappings inside it too, their names joined by dots.
        dtypes: of the tensors; None: no dtype that weights have.
        values: of a torch file, whatever else it holds at its top: numbers, texts, mappings; of a safetensors file its
            tensors without dimensions, as numbers.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype | None]
    values: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Of the largest tensor."""
        largest = max(self.shapes, key=lambda name: int(np.prod(self.shapes[name])), default=None)
        return (None if largest is None else self.dtypes[largest]) or torch.float32


def read_header(file: BinaryIO, where: str) -> Header:
    """The header of a file, whatever its name says.

    Raises:
        UserError: damaged, a pickle that would execute code, or a file of another sort.
    """
    return {"npz": _npz, "torch": _pickled, "safetensors": _safetensors}[_sort_of(file, where)](file, where)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by the names that `Header.shapes` has, on the CPU, as they stand there.

    Raises:
        UserError: damaged, or a pickle that would execute code.
    """
    with path.open("rb") as file:
        sort, header = _sort_of(file, str(path)), read_header(file, str(path))
    if sort == "torch":
        return _flat(load_torch_file(path))
    if sort == "npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in header.shapes}
    try:
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in header.shapes}
    except SafetensorError as error:
        raise UserError(damage(path) or f"{path} is damaged ({error})") from error


def _sort_of(file: BinaryIO, where: str) -> Literal["npz", "torch", "safetensors"]:
    """Numpy's npz and what `torch.save` writes are zip archives both; it once wrote bare pickles."""
    start = file.read(len(POINTER))
    file.seek(0)
    if start == POINTER:
        raise UserError(f"{where} is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder, or "
                        "download it again")
    if not start.startswith(b"PK\x03\x04"):
        return "torch" if start.startswith(b"\x80") else "safetensors"
    try:
        with zipfile.ZipFile(file) as archive:
            return "npz" if any(name.endswith(".npy") for name in archive.namelist()) else "torch"
    except zipfile.BadZipFile as error:
        raise UserError(f"{where} is damaged ({error}): download it again") from error
    finally:
        file.seek(0)


def _safetensors(file: BinaryIO, where: str) -> Header:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _LONGEST_HEADER:
        raise UserError(f"{where} is damaged: it is no file of safetensors, numpy or torch (it begins with {start!r})")
    try:
        entries = {name: entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"}
        numbers = {}
        for name, entry in entries.items():
            if not entry["shape"] and entry["dtype"] in _NUMBERS:
                file.seek(8 + length + entry["data_offsets"][0])
                (numbers[name],) = struct.unpack(*_packed(file, entry["dtype"]))
        return Header({name: tuple(entry["shape"]) for name, entry in entries.items()},
                      {name: _SAFETENSORS.get(entry["dtype"]) for name, entry in entries.items()}, numbers)
    except UserError:  # of the hub, while it is read
        raise
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{where} is damaged (its header cannot be read): download it again") from error


def _packed(file: BinaryIO, dtype: str) -> tuple[str, bytes]:
    """How a number is packed, and its bytes."""
    return _NUMBERS[dtype], file.read(struct.calcsize(_NUMBERS[dtype]))


def _npz(file: BinaryIO, where: str) -> Header:
    found = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                with archive.open(name) as array:
                    read = npy.read_array_header_1_0 if npy.read_magic(array) == (1, 0) else npy.read_array_header_2_0
                    shape, _, dtype = read(array)
                    found[name.removesuffix(".npy")] = (shape, dtype)
    except UserError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(f"{where} is damaged ({error}): download it again") from error
    if pickled := [name for name, (_, dtype) in found.items() if dtype.hasobject]:
        raise UserError(f"{where} was refused: {pickled[0]} is a pickle, which could execute code of its own; save "
                        "arrays of numbers alone")
    return Header({name: shape for name, (shape, _) in found.items()},
                  {name: getattr(torch, dtype.name, None) for name, (_, dtype) in found.items()}, {})


def _pickled(file: BinaryIO, where: str) -> Header:
    """Of `torch.save`: what it holds, without its numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and few files need it

    try:
        with FakeTensorMode():
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{where} was refused: it is a pickle that would execute code of its own; save its tensors, "
                        "numbers and texts alone (state_dict)") from error
    except DAMAGED as error:
        raise UserError(f"{where} is damaged or no torch file; copy it again") from error
    tensors = _flat(tree)
    values = {} if not isinstance(tree, dict) else {
        str(name): value for name, value in tree.items() if not isinstance(value, Tensor)}
    return Header({name: tuple(tensor.shape) for name, tensor in tensors.items()},
                  {name: tensor.dtype for name, tensor in tensors.items()}, values)


def _flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a mapping, and of mappings in it."""
    found: dict[str, Tensor] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        else:
            found |= _flat(value, f"{prefix}{name}.")
    return found
