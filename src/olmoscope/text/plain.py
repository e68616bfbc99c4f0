"""Text files, one document each."""

from collections.abc import Iterator
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.text.row import Malformed, Row, checked


def read(path: Path, name: str, start: int) -> Iterator[Row | Malformed]:
    """The single row of a UTF-8 text file, with the file's name as id; nothing if `start` is past it.

    Raises:
        UserError: the file is absent or cannot be read.
    """
    if start > 0:
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Malformed(f"not UTF-8: {error.reason} at byte {error.start}")
        return
    yield checked(text, name, name)
