"""Rows of parquet files, starting at any row."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.model_errors import first_line
from olmoscope.text.row import Malformed

_BATCH_ROWS = 128
"""Rows decoded at once: a chat can have many thousands of characters, and a row group thousands of chats."""


def columns_of(path: Path) -> list[str]:
    """The names of a file's columns.

    Raises:
        UserError: the file is absent, is not parquet, or is damaged.
    """
    import pyarrow.parquet as pq

    with _explained(path), pq.ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def read_columns(path: Path, columns: Sequence[str], start: int) -> Iterator[dict[str, Any] | Malformed]:
    """Those of the given columns that the file has, for each row.

    Args:
        start: rows to skip; row groups before it are not read.

    Raises:
        UserError: the file is absent, is not parquet, or is damaged.
    """
    import pyarrow.parquet as pq

    with _explained(path), pq.ParquetFile(path) as file:
        first, before = 0, 0
        while first < file.num_row_groups and before + file.metadata.row_group(first).num_rows <= start:
            before += file.metadata.row_group(first).num_rows
            first += 1
        wanted = [name for name in columns if name in file.schema_arrow.names]
        row = before
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(range(first, file.num_row_groups)),
                                       columns=wanted):
            for index in range(max(0, start - row), batch.num_rows):
                yield _values(batch, index)
            row += batch.num_rows


def _values(batch: Any, index: int) -> dict[str, Any] | Malformed:
    try:
        return {column: batch.column(column)[index].as_py() for column in batch.schema.names}
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8: {error.reason}")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises about a file into a `UserError`."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({first_line(error)}); if it is damaged, delete it and "
                        "fetch it again") from error
