"""Read headers and tensors of files of safetensors, numpy (npz) and `torch.save`. Nothing in a file is executed."""

import io
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
from olmoscope.sae.io.torch_file import DAMAGED, begins_pickle, load_torch_file

_LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header; the library has the same limit."""

_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Its names for the dtypes of weights."""

_NUMBERS = {"F64": "<d", "F32": "<f"}
"""The `struct` format of a single number."""


@dataclass(frozen=True)
class Header:
    """The content of a file, without the tensors' data.

    Attributes:
        shapes: of the tensors, by name; names in nested mappings of a torch file are joined by dots.
        dtypes: of the tensors, by name; None for one that is not a floating-point dtype.
        values: everything but tensors at the top of a torch file; the numbers in a safetensors file (tensors without
            dimensions).
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype | None]
    values: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor."""
        largest = max(self.shapes, key=lambda name: int(np.prod(self.shapes[name])), default=None)
        return (None if largest is None else self.dtypes[largest]) or torch.float32


def read_header(file: BinaryIO, where: str) -> Header:
    """The header of a file. Its content decides how it is read, not its name.

    Raises:
        UserError: damaged, a pickle that would execute code, or another type of file.
    """
    return {"npz": _npz, "torch": _pickled, "safetensors": _safetensors}[_sort_of(file, where)](file, where)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by the names in `Header.shapes`, on the CPU, in their own dtypes.

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


def not_finite(where: str, name: str) -> str:
    """The message about a tensor with values that are not finite."""
    return (f"{where}: {name} holds NaN or inf, so the SAE cannot be used: download the file again, and if that does "
            "not help, ask its author for another one")


def _sort_of(file: BinaryIO, where: str) -> Literal["npz", "torch", "safetensors"]:
    """The type of a file. Numpy and `torch.save` both write zip archives; older torch wrote bare pickles."""
    start = file.read(len(POINTER))
    file.seek(0)
    if start == POINTER:
        raise UserError(f"{where} is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder, or "
                        "download it again")
    if not start.startswith(b"PK\x03\x04"):
        return "torch" if begins_pickle(start) else "safetensors"
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
        raise UserError(f"{where} is damaged or not a file of safetensors, numpy or torch (it begins with {start!r}): "
                        "download it again, or give the SAE's own file")
    try:
        entries = {name: entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"}
        numbers = {}
        for name, entry in entries.items():
            if not entry["shape"] and entry["dtype"] in _NUMBERS:
                file.seek(8 + length + entry["data_offsets"][0])
                packed = _NUMBERS[entry["dtype"]]
                (numbers[name],) = struct.unpack(packed, file.read(struct.calcsize(packed)))
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if (size := file.seek(0, io.SEEK_END)) < end:
            raise UserError(f"{where} is cut off: it has {size} of {end} bytes; download it again")
        return Header({name: tuple(entry["shape"]) for name, entry in entries.items()},
                      {name: _SAFETENSORS.get(entry["dtype"]) for name, entry in entries.items()}, numbers)
    except UserError:  # from the hub: it is a ValueError, but not about the header
        raise
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{where} is damaged (its header cannot be read): download it again") from error


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
                        "only arrays of numbers")
    return Header({name: shape for name, (shape, _) in found.items()},
                  {name: getattr(torch, dtype.name, None) for name, (_, dtype) in found.items()}, {})


def _pickled(file: BinaryIO, where: str) -> Header:
    """The header of a file of `torch.save`, read without its data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and few files need it

    try:
        with FakeTensorMode():
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{where} was refused: it is a pickle that would execute code of its own; save only its "
                        "tensors, numbers and texts (state_dict)") from error
    except DAMAGED as error:
        raise UserError(f"{where} is damaged or not a torch file; copy it again") from error
    tensors = _flat(tree)
    values = {} if not isinstance(tree, dict) else {
        str(name): value for name, value in tree.items() if not isinstance(value, Tensor)}
    return Header({name: tuple(tensor.shape) for name, tensor in tensors.items()},
                  {name: tensor.dtype for name, tensor in tensors.items()}, values)


def _flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in a mapping and in mappings inside it."""
    found: dict[str, Tensor] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        else:
            found |= _flat(value, f"{prefix}{name}.")
    return found
