"""Dolma's format: JSON lines, usually compressed, read line by line.

Each line is an object with `text` and, usually, `id`; its other keys are ignored.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import zstandard

from olmoscope.errors import UserError
from olmoscope.text.row import Malformed, Row, checked

SUFFIXES = (".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".zst", ".json", ".jsonl")

_CHUNK_BYTES = 1 << 16
"""Compressed bytes read at once: small, because text can decompress to many times that."""


def read(path: Path, name: str, start: int) -> Iterator[Row | Malformed]:
    """The lines of a shard. A blank line is a row with an empty text.

    Args:
        name: the shard's name in ids: a line without an `id` gets `name:line`, counted from 1.

    For the other arguments and the errors, see `read_objects`.
    """
    for row, value in enumerate(read_objects(path, start), start=start + 1):
        yield value if isinstance(value, Malformed) else _row(value, f"{name}:{row}")


def read_objects(path: Path, start: int) -> Iterator[dict[str, Any] | Malformed]:
    """The JSON object of each line, an empty one for a blank line.

    A file that is truncated or damaged midway (a cut gzip, a wrong checksum) gives one malformed row at the line
    where reading stopped, and ends there.

    Args:
        path: the shard; its suffix, one of `SUFFIXES`, says how it is compressed.
        start: lines to skip; they are decompressed, not parsed.

    Raises:
        UserError: the file is absent or unreadable, or so damaged that not even its first line can be read.
    """
    row = start
    try:
        with path.open("rb") as file:
            for line in islice(_lines(file, path.suffix), start, None):
                row += 1
                yield _parse(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        if row == 0:
            raise UserError(f"{path} is damaged from its start ({error}); delete it and fetch it again") from error
        yield Malformed(f"the file is damaged from here on ({error}); the rest of it is lost")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _lines(file: IO[bytes], suffix: str) -> Iterable[bytes]:
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".zst":
        return _split(_decompressed(file))
    return file


def _decompressed(file: IO[bytes]) -> Iterator[bytes]:
    """The content of a zstd file of one or more frames.

    The library's own stream reader cannot tell a truncated file from a complete one; here truncation is an `EOFError`.
    """
    # Frames of `zstd --long=31` need the largest window.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    while chunk := file.read(_CHUNK_BYTES):
        while chunk:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends inside a zstd frame")


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest += first
        if others:
            yield rest
            yield from others[:-1]
            rest = others[-1]
    if rest:
        yield rest


def _parse(line: bytes) -> dict[str, Any] | Malformed:
    if not line.strip():
        return {}
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Malformed(f"not JSON: {error}")
    if not isinstance(value, dict):
        return Malformed("not a JSON object")
    return value or Malformed("an empty JSON object")


def _row(value: dict[str, Any], fallback_id: str) -> Row | Malformed:
    if not value:
        return Row(fallback_id, "")
    if "text" not in value:
        return Malformed(f"no key `text` (it has {', '.join(list(value)[:8])})")
    return checked(value["text"], value.get("id"), fallback_id)
