"""The token stage's part of an activation store: tokens/segment-000042.safetensors, one for each segment.

Which sequences make up a segment, and how they are batched, is decided here, before any model runs: so a segment's
activations do not depend on who computes them, or when.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from olmoscope.errors import UserError
from olmoscope.files import atomic_path


def segment_name(segment: int) -> str:
    """`segment-000042.safetensors`."""
    return f"segment-{segment:06d}.safetensors"


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
    """Write tokens/segment-N, with what is needed to pack the next one after a restart.

    Args:
        waiting: tokens already read that belong to later segments.
        state: JSON values: where the text and the packing are.
    """
    arrays = dict(vars(tokens)) | {f"waiting.{name}": array for name, array in waiting.items()}
    with atomic_path(store / "tokens" / segment_name(segment)) as path:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path,
                    {"state": json.dumps(state)})


def read_token_segment(store: Path, segment: int) -> TokenSegment:
    """Read the sequences of a segment.

    Raises:
        UserError: missing or damaged.
    """
    arrays, _ = read_tensors(store / "tokens" / segment_name(segment), "np")
    return TokenSegment(**{name: array for name, array in arrays.items() if not name.startswith("waiting.")})


def read_packing_state(store: Path, segment: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Where packing was after a segment: the waiting tokens and the state given to `write_token_segment`."""
    arrays, metadata = read_tensors(store / "tokens" / segment_name(segment), "np")
    waiting = {name.removeprefix("waiting."): array for name, array in arrays.items() if name.startswith("waiting.")}
    return waiting, json.loads(metadata["state"])


def read_tensors(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, str]]:
    """All tensors and the metadata of a file of a store.

    Args:
        framework: `np` or `pt`: arrays or tensors.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with safe_open(path, framework) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> UserError:
    """What to say of a damaged file of a store, and how to mend it."""
    store = path.parents[1]
    if path.parent.name == "tokens":
        delete = f"{path} and {store}/tokens/index.json"
    else:
        delete = f"{store}/checksums/{path.stem}.json"
    return UserError(f"{path} is damaged ({why}); delete {delete} and run `olmoscope collect` again: it makes anew "
                     "what is missing")
