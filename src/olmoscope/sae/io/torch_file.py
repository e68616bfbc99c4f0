"""Files of `torch.save`, read without executing anything: only tensors, numbers, texts and their containers."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from olmoscope.errors import UserError

DAMAGED = (OSError, EOFError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError,
            struct.error)
"""The errors that torch.load raises on files with missing or changed bytes."""

_HEAD = 512


def is_torch_file(opened: BinaryIO) -> bool:
    """Whether a file begins like those of `torch.save`: a zip archive with a pickle in it or, in older versions, a
    pickle."""
    with opened as file:
        head = file.read(_HEAD)
    return begins_pickle(head) or (head.startswith(b"PK\x03\x04") and b"data.pkl" in head)


def begins_pickle(head: bytes) -> bool:
    """Whether a file begins like a pickle, with the byte 0x80. So does a safetensors file whose header is 128 bytes
    long (or 384, 640, ...), but there a brace follows the 8 bytes of the length.

    Args:
        head: at least the first 9 bytes, or the whole file if it is shorter.
    """
    return head.startswith(b"\x80") and head[8:9] != b"{"


def load_torch_file(path: Path) -> Any:
    """The content of a file, with tensors on the CPU.

    Raises:
        UserError: the file is missing or damaged, or it would execute code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; name the checkpoint file in it") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} was refused: {_executable(path)}; save only its tensors, numbers and texts "
                        "(state_dict), then import that file") from error
    except DAMAGED as error:
        raise UserError(f"{path} is damaged or not a torch checkpoint; copy it again") from error


def _executable(path: Path) -> str:
    """Says what in the file would be executed."""
    if zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if names:
            return f"loading it would execute code of its own ({', '.join(sorted(names))})"
    return "it is a pickle that could execute code of its own"
