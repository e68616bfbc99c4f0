"""Blocks of rows: the unit in which activations are read and checked. Nothing is used before its checksum is verified.

A block is `BLOCK_ROWS` rows of a tensor in a safetensors file (the last one of a file may be shorter), so that a reader
of a slice of a segment need not read the whole segment to know that the slice is sound. The checksum of a block is that
of its bytes, padded with zeros to whole pages of 4096 bytes and read as little-endian 64-bit words w:

    Σ_p (2p + 1) · Σ_i w_pi   mod 2^64          p counts the pages of the block, i the words of a page

Any change within one word, and so any flipped bit, changes the checksum. So do lost, stale or swapped pages, except
with probability 2^-64. It runs at the speed of memory (27 GB/s on a core on which SHA-256 reaches 1.8 and CRC-32 3.2),
so every read is checked. The SHA-256 of each whole file protects against deliberate changes.
"""

import json
import math
import os
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from olmoscope.tokens.segments import damaged

BLOCK_ROWS = 256
"""2 MB at d_model 4096 in bf16: long enough for a disk to read in sequence."""
_WORDS_OF_A_PAGE = 512
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


def checksum(content: np.ndarray) -> str:
    """The checksum of a block's bytes (uint8), 16 hex digits."""
    page = 8 * _WORDS_OF_A_PAGE
    if len(content) % page:
        content = np.concatenate([content, np.zeros(-len(content) % page, np.uint8)])
    sums_P = content.view("<u8").reshape(-1, _WORDS_OF_A_PAGE).sum(axis=1, dtype=np.uint64)
    weights_P = 2 * np.arange(len(sums_P), dtype=np.uint64) + np.uint64(1)
    return f"{int((sums_P * weights_P).sum(dtype=np.uint64)):016x}"


def checksums(rows: Tensor) -> list[str]:
    """The checksum of every block of a tensor `[rows, ...]`."""
    return [checksum(_bytes(rows[start : start + BLOCK_ROWS].contiguous()))
            for start in range(0, len(rows), BLOCK_ROWS)]


def read_blocks(path: Path, name: str, part: slice, sums: list[str], out: Tensor | None = None) -> Tensor:
    """Some rows of a tensor in a safetensors file, `[part, ...]`, each block compared with its checksum.

    Args:
        part: the first row and the end. A block is read whole even if only some of its rows are wanted, because its
            checksum covers all of it.
        sums: the checksums of all blocks of the tensor.
        out: a contiguous tensor with the file's dtype and the part's shape, to fill and return; by default new memory.

    Raises:
        UserError: the file is missing, truncated or not as expected, or a checksum differs.
    """
    try:
        with path.open("rb", buffering=0) as file:
            dtype, (rows, *shape), offset = _header(file, name, path)
            first, end = part.start // BLOCK_ROWS * BLOCK_ROWS, min(-(-part.stop // BLOCK_ROWS) * BLOCK_ROWS, rows)
            if part.stop > end or (out is not None and (out.dtype, list(out.shape[1:])) != (dtype, shape)):
                raise damaged(path, f"it holds {dtype} {[rows, *shape]}")
            exact = (first, end) == (part.start, part.stop)
            whole = out if out is not None and exact else torch.empty(end - first, *shape, dtype=dtype)
            content = _bytes(whole)
            row_bytes = math.prod(shape) * dtype.itemsize
            _fill(file.fileno(), content, offset + first * row_bytes, path)
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    size = BLOCK_ROWS * row_bytes
    for number, start in enumerate(range(0, len(content), size), first // BLOCK_ROWS):
        if checksum(content[start : start + size]) != sums[number]:
            raise damaged(path, f"the checksum of rows {number * BLOCK_ROWS} to "
                                f"{min(rows, (number + 1) * BLOCK_ROWS) - 1} differs")
    if exact:
        return whole
    asked = whole[part.start - first : part.stop - first]
    return asked if out is None else out.copy_(asked)


def _header(file: IO[bytes], name: str, path: Path) -> tuple[torch.dtype, list[int], int]:
    """dtype and shape of a tensor, and its offset in the file, after a check that the file holds all of it."""
    try:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(min(size, 2**20)))[name]
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"its header is not sound: {' '.join(str(error).split())}") from error
    if not sound or not shape or math.prod(shape) * dtype.itemsize != end - start:
        raise damaged(path, "its header is not sound")
    if os.fstat(file.fileno()).st_size < 8 + size + end:
        raise damaged(path, "it is cut off")
    return dtype, shape, 8 + size + start


def _fill(descriptor: int, content: np.ndarray, offset: int, path: Path) -> None:
    filled = 0
    while filled < len(content):
        got = os.preadv(descriptor, [content.data[filled:]], offset + filled)
        if not got:
            raise damaged(path, "it is cut off")
        filled += got


def _bytes(rows: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, as bytes."""
    content: np.ndarray = rows.view(-1).view(torch.uint8).numpy()
    return content
