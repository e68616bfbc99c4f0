"""Every question to an endpoint, and its answer: no question that was paid for is asked again.

One SQLite file. A row's key is the SHA-256 of its question; the answer beside it is the server's own text. A row is on
the disk before anybody uses the answer, so a run that is killed loses the questions in flight and nothing else. Any
number of runs may use the file at once: each claims a question before it asks (`claim`), and the others wait for the
answer. A claim is a lock on one byte of a file beside the cache, which the kernel frees when the process ends.
"""

import errno
import fcntl
import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError

VERSION = 1
_WAIT_SECONDS = 60
_SCHEMA = """
CREATE TABLE answers (key TEXT PRIMARY KEY, question TEXT NOT NULL, answer TEXT NOT NULL, written TEXT NOT NULL);
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


def canonical(question: Mapping[str, Any]) -> str:
    """A question's canonical text: JSON with sorted keys and no spaces, in ASCII."""
    return json.dumps(question, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def key_of(question: str) -> str:
    """The SHA-256 of a canonical question, in hex."""
    return hashlib.sha256(question.encode()).hexdigest()


class AnswerCache:
    """The cache file. Any number of threads and processes may use it."""

    def __init__(self, path: Path) -> None:
        """Open the file, making it if it is absent.

        Raises:
            UserError: it is damaged, is not a cache of answers, or has a later version; the file system has no locks.
        """
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()  # with the mode that a new file has here
            self._claims = path.with_name(path.name + ".claims").open("ab")
            self._connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None,
                                               check_same_thread=False)
            self._open()
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}") from error
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path} is damaged or not a cache of answers ({error}); move it away, or restore a "
                            "copy") from error

    def _open(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            if not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._connection.execute(statement)
                self._connection.executemany("INSERT INTO about VALUES (?, ?)", [
                    ("format", "olmoscope answers"), ("version", str(VERSION))])
        tables = {name for name, in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        about = dict(self._connection.execute("SELECT key, value FROM about")) if "about" in tables else {}
        if about.get("format") != "olmoscope answers" or int(about["version"]) > VERSION:
            raise UserError(f"{self.path} is not a cache of answers of this version of olmoscope; move it away")

    def get(self, key: str) -> str | None:
        """The answer to a question; None if it was never answered.

        Raises:
            UserError: the row is damaged.
        """
        with self._lock:
            try:
                row = self._connection.execute("SELECT question, answer FROM answers WHERE key = ?", (key,)).fetchone()
            except sqlite3.DatabaseError as error:
                raise UserError(f"cannot read {self.path} ({error}); move it away, or restore a copy") from error
        if row is None:
            return None
        if key_of(row[0]) != key:
            raise UserError(f"{self.path} is damaged: the question of row {key} has another checksum; move the file "
                            "away, or restore a copy")
        return str(row[1])

    def put(self, question: str, answer: str) -> None:
        """Keep an answer; when this returns, it is on the disk. The first answer to a question stays.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        with self._lock:
            try:
                self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", (
                    key_of(question), question, answer, datetime.now(UTC).isoformat(timespec="milliseconds")))
            except sqlite3.DatabaseError as error:
                raise UserError(f"cannot write {self.path} ({error}); answers so far are kept: fix that and "
                                "run the same command again") from error

    def claim(self, key: str) -> bool:
        """Claim a question for this process, until `release` or the end of the process.

        Returns:
            False if another process has claimed it.

        Raises:
            UserError: the file system has no locks.
        """
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte_of(key))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise UserError(f"the file system of {self.path} has no file locks, without which two runs would ask "
                            "everything twice; keep the index on another one") from error
        return True

    def release(self, key: str) -> None:
        """Release a claim."""
        fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, _byte_of(key))

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            self._claims.close()

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _byte_of(key: str) -> int:
    """The byte of the claims file that represents a question. If two questions share one, they take turns."""
    return int(key[:12], 16)
