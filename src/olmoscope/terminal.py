"""Output for any terminal, file or pipe: characters that its encoding lacks are replaced, and where the reader of a
pipe has gone (`| head`), the command ends quietly.

Tables use mathematical signs (Δ, ‖, ²). A standard stream that is not UTF-8 (`LC_ALL=C`, a Latin-1 locale,
`PYTHONIOENCODING=ascii`) cannot take them, and Python would end a command that has done all its work in an error.
"""

import codecs
import errno
import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

HANDLER = "olmoscope.stand_in"
"""The name of the error handler under which codecs know `_stand_in`."""

STAND_INS = {"Δ": "d", "‖": "||", "²": "^2", "\u0302": "^", "…": "...", "·": "*", "×": "x", "−": "-", "–": "-",
             "—": "-", "≤": "<=", "≥": ">=", "√": "sqrt ", "Σ": "sum ", "•": "*", "→": "->", "←": "<-", "‘": "'",
             "’": "'", "“": '"', "”": '"', "\u00a0": " "}
"""Replacements for the characters that we print. All others (in a path, a token) appear as Python writes them in ASCII:
`\\u4e2d`."""


class Terminal(Console):
    """A rich console whose text fits the stream's encoding before it is laid out: columns stay straight."""

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(writable(text, self.encoding), **settings)


def prepare_streams() -> None:
    """Give standard output and standard error stand-ins for what their encodings lack."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # absent where a test or a host caught the output
            reconfigure(errors=HANDLER)


def say(text: str, *, err: bool = False) -> None:
    """Print a line as it is, however long; unlike `typer.echo`, which writes UTF-8 where the terminal is ASCII."""
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


def writable(text: str, encoding: str) -> str:
    """Text with stand-ins for what an encoding lacks."""
    if encoding.startswith("utf"):
        return text
    return text.encode(encoding, HANDLER).decode(encoding, "surrogateescape")


def end_quietly_if_nobody_reads() -> None:
    """Flush standard output; where its reader has gone (`| head`), let Python's own last flush go nowhere.

    Raises:
        SystemExit: with status 1, if the reader has gone, or the disk is full that the output goes to.
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
    """What to write for the first sign that could not be encoded (codecs.register_error)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of a file name that is no text: the same byte again
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return STAND_INS.get(sign) or sign.encode("ascii", "backslashreplace").decode(), error.start + 1


codecs.register_error(HANDLER, _stand_in)
