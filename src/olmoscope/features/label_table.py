"""The labels that count for the features of an index, as a table to use beside its features.parquet.

    FOLDER/labels.parquet    a line for each feature with a label, ascending

features.parquet itself cannot hold them: it belongs to the index, whose manifest has its hash, and labels change.
"""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from olmoscope.features.outgoing import FIGURES, Counting
from olmoscope.files import atomic_path

TABLE = "labels.parquet"
_SCHEMA = pa.schema([
    ("feature", pa.int64()), *((name, pa.string()) for name in ("label", "note", "made_by", "author", "written",
                                                                "verdict")),
    ("score", pa.float64()),
    *((f"{name}{end}", pa.float64()) for name in FIGURES for end in ("", "_low", "_high")),
    ("positives", pa.int64()), ("negatives", pa.int64())])


def write_labels(folder: Path, labels: Mapping[int, Counting]) -> Path:
    """Write the table; unknown figures are null.

    Returns:
        Its path.
    """
    rows = []
    for _, label in sorted(labels.items()):
        row = label.as_json()
        for name in FIGURES:
            value, low, high = row.pop(name) or (None, None, None)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    with atomic_path(folder / TABLE) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), temporary)
    return folder / TABLE
