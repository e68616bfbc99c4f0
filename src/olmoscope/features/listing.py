"""Writing features.parquet: a line for each feature, with the columns that the list shows, sorts and searches."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olmoscope.features.format import map_tensors, part_path
from olmoscope.files import atomic_path

TOKENS_SHOWN = 5
SCHEMA = pa.schema({
    "feature": pa.int32(), "rows": pa.int64(), "density": pa.float64(), "max": pa.float32(), "mean": pa.float64(),
    "tokens": pa.list_(pa.string()), "promoted": pa.list_(pa.string()), "suppressed": pa.list_(pa.string()),
    "source": pa.string()})


def write_listing(index: Path, parts: list[int], texts: list[str], source_rows: dict[str, int]) -> None:
    """Write features.parquet from the parts.

    Args:
        parts: the first feature of each part, then the number of features.
        texts: the text of each token.
        source_rows: the number of rows of each source.
    """
    with atomic_path(index / "features.parquet") as path, pq.ParquetWriter(path, SCHEMA) as writer:
        for number, first in enumerate(parts[:-1]):
            writer.write_table(pa.table(_columns(map_tensors(part_path(index, number)), first, texts, source_rows),
                                        schema=SCHEMA))


def _columns(part: dict[str, np.ndarray], first: int, texts: list[str], source_rows: dict[str, int]) -> dict[str, Any]:
    rows = np.diff(part["firings.offsets"])
    total = sum(source_rows.values())

    def shown(name: str) -> list[list[str]] | list[None]:
        if f"{name}.offsets" not in part:  # an index without promoted tokens
            return [None] * len(rows)
        offsets, ids = part[f"{name}.offsets"].tolist(), part[f"{name}.id"].tolist()
        return [[texts[token] for token in ids[start : min(start + TOKENS_SHOWN, end)]]
                for start, end in itertools.pairwise(offsets)]

    return {
        "feature": np.arange(first, first + len(rows), dtype=np.int32),
        "rows": rows,
        "density": rows / total,
        "max": part["max"],
        "mean": part["sum"] / np.maximum(rows, 1),
        "tokens": shown("tokens"), "promoted": shown("promoted"), "suppressed": shown("suppressed"),
        "source": [_preferred_source(line, fired, total, source_rows)
                   for line, fired in zip(part["source_rows"].tolist(), rows.tolist(), strict=True)]}


def _preferred_source(line: list[int], fired: int, total: int, source_rows: dict[str, int]) -> str | None:
    """The source with the highest score n · ln(lift), if any lift is over 1."""
    best, found = 0.0, None
    for (source, of), rows in zip(source_rows.items(), line, strict=True):
        if rows and (score := rows * math.log(rows * total / (fired * of))) > best:
            best, found = score, source
    return found
