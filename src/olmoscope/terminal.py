"""Output for any terminal, file or pipe: characters that its encoding lacks are replaced, and if the reader of a pipe
has gone (`| head`), the command ends quietly.

Tables use mathematical symbols (Δ, ‖, ²). A standard stream that is not UTF-8 (`LC_ALL=C`, a Latin-1 locale,
`PYTHONIOENCODING=ascii`) cannot encode them, so Python would raise an error after the command has done all its work.
"""

import codecs
import errno
import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

HANDLER = "olmoscope.stand_in"
"""The name under which codecs knows the error handler `_stand_in`."""

STAND_INS = {"Δ": "d", "‖": "||", "²": "^2", "\u0302": "^", "…": "...", "·": "*", "×": "x", "−": "-", "–": "-",
             "—": "-", "≤": "<=", "≥": ">=", "√": "sqrt ", "Σ": "sum ", "•": "*", "→": "->", "←": "<-", "‘": "'",
             "’": "'", "“": '"', "”": '"', "\u00a0": " "}
"""Replacements for the characters that we print. All others (in a path, a token) appear as Python escapes them in
ASCII: `\\u4e2d`."""


class Terminal(Console):
    """A rich console whose text fits the stream's encoding before it is laid out: columns stay straight."""

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(writable(text, self.encoding), **settings)


def prepare_streams() -> None:
    """Make standard output and standard error replace the characters that their encodings lack."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # absent if a test or a host captures the output
            reconfigure(errors=HANDLER)


def say(text: str, *, err: bool = False) -> None:
    """Print a line as it is, however long. (`typer.echo` would write UTF-8 even to an ASCII terminal.)"""
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


def writable(text: str, encoding: str) -> str:
    """The text with replacements for the characters that an encoding lacks."""
    if encoding.startswith("utf"):
        return text
    return text.encode(encoding, HANDLER).decode(encoding, "surrogateescape")


def end_quietly_if_nobody_reads() -> None:
    """Flush standard output. If its reader has gone (`| head`), redirect Python's own last flush to the null device.

    Raises:
        SystemExit: with status 1, if the reader has gone, or if the disk that the output goes to is full.
    """
    try:
        if sys.stdout is not None:  # it was closed before we started
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            say(f"error: cannot write to standard output: {error.strerror}", err=True)
        sys.exit(1)


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    """What to write for the first character that could not be encoded (codecs.register_error)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of a file name that is not text: write the same byte
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return STAND_INS.get(sign) or sign.encode("ascii", "backslashreplace").decode(), error.start + 1


codecs.register_error(HANDLER, _stand_in)
