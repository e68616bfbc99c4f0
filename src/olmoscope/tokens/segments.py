"""The token stage's part of an activation store: tokens/segment-000042.safetensors, one for each segment.

Its SHA-256 is in checksums/tokens-000042.json; once that is written, the token segment exists. Which sequences make up
a segment, and how they are batched, is decided here, before any model runs, so a segment's activations do not depend on
which worker computes them, or when.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from olmoscope.errors import UserError
from olmoscope.files import atomic_path, read_json, sha256, write_json


def segment_name(segment: int) -> str:
    """`segment-000042.safetensors`."""
    return f"segment-{segment:06d}.safetensors"


def token_checksum(store: Path, segment: int) -> Path:
    """Where the checksum of a token segment is."""
    return store / "checksums" / f"tokens-{segment:06d}.json"


def has_token_segment(store: Path, segment: int) -> bool:
    """Whether a token segment is written."""
    return token_checksum(store, segment).exists() and (store / "tokens" / segment_name(segment)).exists()


@dataclass(frozen=True)
class TokenSegment:
    """The sequences of one segment, in the order in which they are read; R tokens in S sequences and N batches."""

    token_ids: np.ndarray
    """`[R]` int32."""
    document_ids: np.ndarray
    """`[R]` int64."""
    sources: np.ndarray
    """`[R]` uint8, index into the manifest's sources."""
    sequence_numbers: np.ndarray
    """`[S]` int64, counted over the whole store in the order of the text."""
    sequence_starts: np.ndarray
    """`[S + 1]` int64 offsets into the tokens."""
    batch_starts: np.ndarray
    """`[N + 1]` int64 offsets into the sequences."""

    @property
    def rows(self) -> int:
        return len(self.token_ids)


def write_token_segment(store: Path, segment: int, tokens: TokenSegment, waiting: dict[str, np.ndarray],
                        state: dict[str, Any]) -> None:
    """Write tokens/segment-N, with what is needed to pack the next segment after a restart.

    Args:
        waiting: tokens already read that belong to later segments.
        state: the positions of the text and of the packing, as JSON values.
    """
    arrays = dict(vars(tokens)) | {f"waiting.{name}": array for name, array in waiting.items()}
    relative = f"tokens/{segment_name(segment)}"
    with atomic_path(store / relative) as path:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path,
                  {"state": json.dumps(state)})
        sums = {relative: sha256(path)}
    write_json(token_checksum(store, segment), {"rows": tokens.rows, "sha256": sums})


def read_token_segment(store: Path, segment: int) -> TokenSegment:
    """Read the sequences of a segment, and compare the file with its checksum.

    Raises:
        UserError: the file is missing or damaged.
    """
    arrays, _ = _read_checked(store, segment)
    return TokenSegment(**{name: array for name, array in arrays.items() if not name.startswith("waiting.")})


def read_packing_state(store: Path, segment: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The state of packing after a segment: the waiting tokens and the state given to `write_token_segment`.

    Raises:
        UserError: the file is missing or damaged.
    """
    arrays, metadata = _read_checked(store, segment)
    waiting = {name.removeprefix("waiting."): array for name, array in arrays.items() if name.startswith("waiting.")}
    return waiting, json.loads(metadata["state"])


def _read_checked(store: Path, segment: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a token segment, always checked: it decides all that is made from it, and it is small."""
    relative = f"tokens/{segment_name(segment)}"
    path = store / relative
    if not path.exists():
        raise damaged(path, "it is missing")
    if sha256(path) != read_json(token_checksum(store, segment))["sha256"].get(relative):
        raise damaged(path, "its checksum differs")
    return read_tensors(path, "np")


def read_tensors(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, str]]:
    """All tensors and the metadata of a file of a store.

    Args:
        framework: `np` for arrays, `pt` for tensors.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> UserError:
    """The error for a damaged file of a store, which says how to repair it."""
    return UserError(f"{path} is damaged ({why}); run `olmoscope store repair {path.parents[1]}`, then `olmoscope "
                     "collect` again, which replaces what is missing")
