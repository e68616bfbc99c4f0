"""An SQLite file beside an index: any number of threads and processes may use it.

Readers never wait for a writer, nor a writer for readers (SQLite's write-ahead log); writers wait for each other. A
table `about` says what the file is: its format, its version, and the width of its SAE.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from olmoscope.errors import UserError

_WAIT_SECONDS = 30


class Database:
    """An open file."""

    def __init__(self, path: Path, what: str, version: int, schema: str, d_sae: int) -> None:
        """Open the file, making it if it is absent.

        Args:
            what: its format is called `olmoscope WHAT`.
            schema: of its tables except `about`.

        Raises:
            UserError: it is damaged, is something else, has a later version, or belongs to an SAE of another width.
        """
        self.path, self.d_sae = path, d_sae
        self._local = threading.local()
        self._writing = threading.Lock()
        try:
            self._open(what, version, schema)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is damaged or not a {what} file ({error}); move it away, or restore a "
                            "copy") from error

    def _open(self, what: str, version: int, schema: str) -> None:
        self.connection().execute("PRAGMA journal_mode = WAL")
        with self.writing() as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in filter(str.strip, schema.split(";")):
                    connection.execute(statement)
                connection.execute("CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
                connection.executemany("INSERT INTO about VALUES (?, ?)",
                                       [("format", f"olmoscope {what}"), ("version", str(version)),
                                        ("d_sae", str(self.d_sae))])
        about = dict(connection.execute("SELECT key, value FROM about").fetchall())
        if about.get("format") != f"olmoscope {what}" or int(about["version"]) > version:
            raise UserError(f"{self.path} is not a {what} file of this version of olmoscope: {about}")
        if int(about["d_sae"]) != self.d_sae:
            raise UserError(f"{self.path} has the {what} of an SAE of {about['d_sae']} latents, this one has "
                            f"{self.d_sae}; move it away")

    def connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "connection"):
            try:
                self.path.touch()  # with the mode that a new file has here; SQLite would make it 0644 at most
                connection = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, isolation_level=None)
            except (OSError, sqlite3.OperationalError) as error:
                raise UserError(f"cannot open {self.path}: {error}") from error
            connection.execute("PRAGMA synchronous = FULL")
            self._local.connection = connection
        connection = self._local.connection
        assert isinstance(connection, sqlite3.Connection)
        return connection

    def close(self) -> None:
        """Close this thread's connection; once the last one is closed, nothing is left beside the file."""
        if hasattr(self._local, "connection"):
            self._local.connection.close()
            del self._local.connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: when the block ends, everything that it wrote is on the disk; if it raises, nothing is."""
        connection = self.connection()
        with self._writing:
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                yield connection


def searched(text: str) -> str:
    """A query of FTS5 for all words that begin with those of a text; empty if the text has no words.

    Each word is quoted, so that nothing in it is an operator of the query language.
    """
    return " ".join('"' + word.replace('"', '""') + '"*' for word in text.replace("\0", " ").split())
