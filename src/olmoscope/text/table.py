"""Rows of parquet or JSON-lines files, and the texts or chats in one of their columns."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.text import dolma, parquet
from olmoscope.text.chat import ToText, row_of_chat
from olmoscope.text.row import Malformed, Row, checked

SUFFIXES = (".parquet", *dolma.SUFFIXES)
"""Suffixes of tables; a table with any other suffix is read as parquet."""
CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that may hold chats, in order of preference; the second is ShareGPT's."""
COLUMNS = ("text", *CHAT_COLUMNS)
"""Columns to read by default, in order of preference."""


def read_texts(path: Path, name: str, start: int, column: str, to_text: ToText) -> Iterator[Row | Malformed]:
    """The texts of a column; a list or mapping in it is a chat.

    Args:
        path: the file; its suffix gives its format (`SUFFIXES`).
        name: the file's name in ids: a row without an `id` gets `name:row`, counted from 1.
        start: rows to skip.
        to_text: how chats become text.

    Raises:
        UserError: the file is absent, is damaged from its start, or has no such column.
    """
    def make(value: object, row_id: object, fallback_id: str) -> Row | Malformed:
        if isinstance(value, list | dict):
            return row_of_chat(value, row_id, fallback_id, to_text)
        return checked(value, row_id, fallback_id)

    return _read(path, name, start, (column,), make)


def read_chats(path: Path, name: str, start: int, column: str | None, to_text: ToText) -> Iterator[Row | Malformed]:
    """The chats of a column; a string in it is parsed as JSON.

    Args:
        column: the column, or None for the first of `CHAT_COLUMNS` that the file has.

    For the other arguments and the errors, see `read_texts`.
    """
    def make(value: object, row_id: object, fallback_id: str) -> Row | Malformed:
        return row_of_chat(value, row_id, fallback_id, to_text)

    return _read(path, name, start, CHAT_COLUMNS if column is None else (column,), make)


def column_of(names: list[str]) -> str | None:
    """The column of a table to read by default; None if it has none of `COLUMNS`."""
    return next((column for column in COLUMNS if column in names), None)


def columns_of(path: Path) -> list[str]:
    """The columns of a file, or the keys of its first line that is not blank; empty if it has no valid line.

    Raises:
        UserError: the file is absent or damaged.
    """
    if not _is_lines(path):
        return parquet.columns_of(path)
    return next((list(value) for value in dolma.read_objects(path, 0) if isinstance(value, dict) and value), [])


def _is_lines(path: Path) -> bool:
    return path.name.endswith(dolma.SUFFIXES)


def _read(path: Path, name: str, start: int, columns: tuple[str, ...],
          make: Callable[[object, object, str], Row | Malformed]) -> Iterator[Row | Malformed]:
    for number, values in enumerate(_rows(path, start, columns), start=start + 1):
        fallback_id = f"{name}:{number}"
        if isinstance(values, Malformed):
            yield values
        elif not values and _is_lines(path):
            yield Row(fallback_id, "")
        else:
            yield _row(values, columns, fallback_id, make)


def _row(values: dict[str, Any], columns: tuple[str, ...], fallback_id: str,
         make: Callable[[object, object, str], Row | Malformed]) -> Row | Malformed:
    column = next((column for column in columns if column in values), None)
    if column is None:
        return Malformed(f"no key {' or '.join(columns)} (it has "
                         f"{', '.join(list(values)[:8])})")
    return make(values[column], values.get("id"), fallback_id)


def _rows(path: Path, start: int, columns: tuple[str, ...]) -> Iterator[dict[str, Any] | Malformed]:
    if _is_lines(path):
        return dolma.read_objects(path, start)
    names = parquet.columns_of(path)
    column = next((column for column in columns if column in names), None)
    if column is None:
        raise UserError(f"{path} has no column {' or '.join(columns)} (it has "
                        f"{', '.join(names)}); name the right one as the source's `column`")
    return parquet.read_columns(path, [column, "id"], start)
