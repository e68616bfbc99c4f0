"""Write a safetensors file piece by piece: it is hashed while it is written, without a second copy in memory.

The bytes are those that the safetensors library writes: an 8-byte length, a JSON header padded with spaces to a
multiple of 8, then the tensors, sorted by dtype (widest first) and by name.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from olmoscope.files import atomic_file

PIECE = 2**23
"""Bytes hashed and written at a time: 8 MiB, about 10 ms."""

_NAMES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
          torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
"""The names of dtypes, in the order in which tensors appear in a file."""


def write_tensors(path: Path, tensors: dict[str, Tensor], between: Callable[[], None] = lambda: None) -> str:
    """Write contiguous CPU tensors, atomically.

    Args:
        between: called between pieces; if it raises, writing ends and no file appears.

    Returns:
        The SHA-256 of the file, in hex.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    rank = {dtype: number for number, dtype in enumerate(_NAMES)}
    ordered = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, object] = {}
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with atomic_file(path) as file:
        def put(piece: bytes | memoryview) -> None:
            between()
            digest.update(piece)
            file.write(piece)

        put(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            content = _bytes_of(tensors[name])
            for start in range(0, len(content), PIECE):
                put(content[start : start + PIECE])
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # up to one element, any stride counts as contiguous; a view as bytes needs 1
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy().data)
