"""The layout on disk of a checkpoint of our own runs: one safetensors file, or a folder of shards.

    step-00001000.safetensors            everything
    step-00001000/                       for an SAE that was trained in shards (`train.shards`)
        shard-003-of-008.safetensors     what belongs to the latents of a shard; concatenated in order, these tensors
                                         are the whole SAE's
        shared.safetensors               the rest, and what the checkpoint says about itself; written last: a folder
                                         without it is not complete, and is not read

checkpoint.py describes the tensors. Each file has metadata as JSON, under `olmoscope`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, remove

METADATA = "olmoscope"
SHARED = "shared.safetensors"


def shard_path(folder: Path, number: int, shards: int) -> Path:
    """The file of a shard, counted from 0, in the folder of a checkpoint."""
    return folder / f"shard-{number:03d}-of-{shards:03d}.safetensors"


def is_complete(path: Path) -> bool:
    """Whether a checkpoint, a file or a folder, was written to its end."""
    return path.is_file() or (path / SHARED).is_file()


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; if killed half-way, this leaves a folder that is not complete."""
    if path.is_dir():
        (path / SHARED).unlink(missing_ok=True)
    remove(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write one file, atomically."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary,
                  {METADATA: json.dumps(metadata)})


def missing(path: Path) -> str:
    """The message about a checkpoint that its run's done.json names and that is not there."""
    return f"{path} is missing: copy it back, or delete the run's done.json and run `olmoscope train` again"


@contextlib.contextmanager
def opened_file(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """A file's metadata, and the file; any damage found while it is open becomes a UserError."""
    try:
        with safe_open(path, "pt") as file:
            yield json.loads((file.metadata() or {})[METADATA]), file
    except FileNotFoundError as error:
        raise UserError(missing(path)) from error
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or not an Olmoscope checkpoint ({error}); delete it, and "
                        "the run's done.json if there is one, and train again: an earlier checkpoint is used if there "
                        "is one") from error


@contextlib.contextmanager
def opened_checkpoint(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """A checkpoint's metadata, and its tensors: `keys()`, `get_tensor(name)`. Shards are joined, one tensor at a time.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    with opened_file(path / SHARED if path.is_dir() else path) as (metadata, file):
        yield metadata, _Joined(path, metadata, file) if path.is_dir() else file


@contextlib.contextmanager
def opened_shard(folder: Path, number: int, metadata: Mapping[str, Any]) -> Iterator[Any]:
    """The tensors of one shard of a checkpoint.

    Args:
        metadata: the checkpoint's own.

    Raises:
        UserError: its file is missing, damaged, or of another step.
    """
    path = shard_path(folder, number, metadata["shards"])
    try:
        with opened_file(path) as (said, file):
            if said["step"] != metadata["step"]:
                raise UserError(f"{path} is of step {said['step']}, but the checkpoint is of step {metadata['step']}; "
                                f"delete {folder}: an earlier checkpoint is used if there is one")
            yield file
    except UserError as error:
        if path.exists():
            raise
        raise UserError(f"{path} is missing, and the checkpoint cannot be used without it; put it back, or delete "
                        f"{folder}: an earlier checkpoint is used if there is one") from error


class _Joined:
    """The tensors of a folder of shards, read like those of one file."""

    def __init__(self, folder: Path, metadata: Mapping[str, Any], shared: Any) -> None:
        self.folder, self.metadata, self.shared = folder, metadata, shared

    def keys(self) -> list[str]:
        """The names of all tensors."""
        with opened_shard(self.folder, 0, self.metadata) as first:
            return [*self.shared.keys(), *first.keys()]

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of the whole SAE."""
        if name in set(self.shared.keys()):
            found: Tensor = self.shared.get_tensor(name)
            return found
        parts = []
        for number in range(self.metadata["shards"]):
            with opened_shard(self.folder, number, self.metadata) as shard:
                parts.append(shard.get_tensor(name))
        return torch.cat(parts)
