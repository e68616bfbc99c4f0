"""Files of `torch.save`, of which nothing is executed: tensors, numbers, texts and their containers are read."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from olmoscope.errors import UserError

DAMAGED = (OSError, EOFError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError,
            struct.error)
"""What torch.load raises on files with bytes missing or changed."""

_HEAD = 512


def is_torch_file(opened: BinaryIO) -> bool:
    """Whether a file begins as `torch.save` begins one: a zip archive with a pickle in it, or, as once, a pickle."""
    with opened as file:
        head = file.read(_HEAD)
    return begins_pickle(head) or (head.startswith(b"PK\x03\x04") and b"data.pkl" in head)


def begins_pickle(head: bytes) -> bool:
    """Whether a file begins as a pickle: with the byte 0x80. So does a file of safetensors whose header is 128 bytes
    long, or 256 more, ...; only there a brace follows its length of 8 bytes.

    Args:
        head: at least 9 bytes of it, where it is not shorter.
    """
    return head.startswith(b"\x80") and head[8:9] != b"{"


def load_torch_file(path: Path) -> Any:
    """What a file holds, tensors on the CPU.

    Raises:
        UserError: missing, damaged, or what would have to be executed.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; name the checkpoint file in it") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} was refused: {_executable(path)}; save its tensors, numbers and texts alone "
                        "(state_dict), then import that") from error
    except DAMAGED as error:
        raise UserError(f"{path} is damaged or no torch checkpoint; copy it again") from error


def _executable(path: Path) -> str:
    """What in the file would have to be executed."""
    if zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if names:
            return f"loading it would execute code of its own ({', '.join(sorted(names))})"
    return "it is a pickle that could execute code of its own"
