"""Checks of one file of a store, which may be damaged; verify.py combines them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from olmoscope.activations.store.blocks import BLOCK_ROWS, checksums
from olmoscope.activations.store.format import Manifest
from olmoscope.errors import UserError
from olmoscope.files import read_json
from olmoscope.tokens.segments import read_tensors, segment_name


def json_or_none(path: Path) -> Any:
    """A JSON file's value; None if it is damaged or missing."""
    try:
        return read_json(path)
    except UserError:
        return None


def sums_or_none(path: Path) -> tuple[int, dict[str, str]] | None:
    """A checksum file: rows, and the SHA-256 of each file; None if it is damaged or missing."""
    value = json_or_none(path)
    try:
        rows, sums = value["rows"], value["sha256"]
        return (rows, sums) if isinstance(rows, int) and all(isinstance(sum, str) for sum in sums.values()) else None
    except (TypeError, KeyError, AttributeError):
        return None


def folders_of(manifest: Manifest) -> set[str]:
    """The folders that a store has."""
    return {"tokens", "checksums", "rows", "statistics", *(site.folder for site in manifest.sites)}


def is_complete(listed: Iterable[str], segment: int, manifest: Manifest) -> bool:
    """Whether a checksum file covers everything that readers use of a segment."""
    folders = ("rows", "statistics", *(site.folder for site in manifest.sites))
    return {f"{folder}/{segment_name(segment)}" for folder in folders} <= set(listed)


def how_damaged(path: Path) -> str:
    """Whether the file is truncated or changed: the header of a safetensors file says how long it is."""
    try:
        with safe_open(path, "np"):
            return "its content differs from its checksum"
    except SafetensorError as error:
        return f"truncated or overwritten ({path.stat().st_size} bytes: {str(error).strip()})"


def blocks_fit(checksum: Path, relative: str, path: Path) -> bool:
    """Whether the checksums of blocks, which readers of slices rely on, match a sound file."""
    try:
        listed, rows = json_or_none(checksum)["blocks"][relative], json_or_none(checksum)["block_rows"]
    except (TypeError, KeyError):
        return False
    found = {name: checksums(tensor) for name, tensor in read_tensors(path, "pt")[0].items()}
    return bool(listed == found and rows == BLOCK_ROWS)


def shape_mistake(path: Path, rows: int, manifest: Manifest | None) -> str:
    """What is wrong with the shape of a site's file, from its header; empty if nothing is."""
    with safe_open(path, "np") as file:
        found = list(file.get_slice("activations").get_shape())
    widths = {site.folder: manifest.width(site) for site in manifest.sites} if manifest else {}
    wanted = [rows, widths.get(path.parent.name, found[-1])]
    return "" if found == wanted else f"holds activations {found}, not {wanted}"


def rows_of_tokens(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`token_id`, `sequence`, `position`, `source` of each row, in the order of the token segment."""
    starts = arrays["sequence_starts"]
    lengths = np.diff(starts)
    return {"token_id": arrays["token_ids"], "sequence": np.repeat(arrays["sequence_numbers"], lengths),
            "position": np.arange(len(arrays["token_ids"])) - np.repeat(starts[:-1], lengths),
            "source": arrays["sources"]}


def same_rows(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    """Whether two sets of rows are equal apart from their order."""
    names = ("sequence", "position", "token_id", "source")
    if any(len(found[name]) != len(wanted[name]) for name in names):
        return False
    orders = [np.lexsort((rows["position"], rows["sequence"])) for rows in (found, wanted)]
    return all(np.array_equal(found[name][orders[0]], wanted[name][orders[1]]) for name in names)
