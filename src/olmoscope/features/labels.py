"""What people (and programs) write about features: labels and notes with their history, in one SQLite file.

Nothing is overwritten: an edit is a new entry, and the newest entry of a feature counts. Readers never wait for a
writer, nor a writer for readers (SQLite's write-ahead log); writers wait for each other.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.features.database import Database, searched

LABELS_FILE = "labels.sqlite"
"""The file's name in the folder of an index."""
VERSION = 1
LONGEST = 20_000
"""The most characters of a label or a note."""
_SCHEMA = """
CREATE TABLE entries (id INTEGER PRIMARY KEY, feature INTEGER NOT NULL, label TEXT NOT NULL, note TEXT NOT NULL,
                      author TEXT NOT NULL, score REAL, written TEXT NOT NULL);
CREATE INDEX entries_of_feature ON entries (feature, id);
CREATE VIRTUAL TABLE words USING fts5 (label, note, prefix = '1 2 3');
"""
_COLUMNS = "id, feature, label, note, author, score, written"


@dataclass(frozen=True)
class Entry:
    """What somebody wrote about a feature at some time; an empty label and an empty note withdraw it."""

    id: int
    """Ascending in the order of writing."""
    feature: int
    label: str
    note: str
    author: str
    score: float | None
    """How well the label predicts the feature; None if that was not measured."""
    written: str
    """ISO 8601, UTC."""


class Labels(Database):
    """The labels of one SAE. Any number of threads and processes may use the same file."""

    def __init__(self, path: Path, d_sae: int) -> None:
        """Open the file, making it if it is absent.

        Raises:
            UserError: it is damaged, is not a labels file, has a later version, or belongs to an SAE of another width.
        """
        super().__init__(path, "labels", VERSION, _SCHEMA, d_sae)

    def write(self, feature: int, label: str, note: str, author: str = "", score: float | None = None) -> Entry:
        """Add an entry; when this returns, it is on the disk.

        Raises:
            UserError: no such feature, or a text that is too long.
        """
        return self.write_all([(feature, label, note, author, score, _now())])[0]

    def write_all(self, rows: Iterable[tuple[int, str, str, str, float | None, str]]) -> list[Entry]:
        """Add entries (feature, label, note, author, score, written) in one transaction: all of them or none.

        Raises:
            UserError: as `write`.
        """
        checked = [self._checked(*row) for row in rows]
        entries = []
        with self.writing() as connection:
            for row in checked:
                cursor = connection.execute("INSERT INTO entries (feature, label, note, author, score, written) "
                                            "VALUES (?, ?, ?, ?, ?, ?)", row)
                entries.append(Entry(cursor.lastrowid or 0, *row))
                connection.execute("DELETE FROM words WHERE rowid = ?", (row[0],))
                if row[1] or row[2]:
                    connection.execute("INSERT INTO words (rowid, label, note) VALUES (?, ?, ?)", row[:3])
        return entries

    def _checked(self, feature: int, label: str, note: str, author: str, score: float | None, written: str
                 ) -> tuple[int, str, str, str, float | None, str]:
        if not 0 <= feature < self.d_sae:
            raise UserError(f"there is no feature {feature}: the SAE has features 0 to {self.d_sae - 1}")
        for what, text in (("label", label), ("note", note), ("author", author)):
            if len(text) > LONGEST:
                raise UserError(f"the {what} of feature {feature} has {len(text)} characters, at most {LONGEST} are "
                                "kept")
        # A lone surrogate cannot be written as UTF-8; only a broken client sends one.
        label, note, author = (text.encode("utf-8", "replace").decode() for text in (label, note, author))
        return feature, label.strip(), note.strip(), author, score, written

    def history(self, feature: int) -> list[Entry]:
        """All entries of a feature, newest first."""
        return self._entries("WHERE feature = ? ORDER BY id DESC", feature)

    def newest(self, feature: int) -> Entry | None:
        """The entry that counts for a feature; None if nothing was ever written."""
        entries = self._entries("WHERE feature = ? ORDER BY id DESC LIMIT 1", feature)
        return entries[0] if entries else None

    def since(self, entry: int) -> list[Entry]:
        """All entries after the given one, oldest first; `since(0)` returns all."""
        return self._entries("WHERE id > ? ORDER BY id", entry)

    def _entries(self, where: str, number: int) -> list[Entry]:
        rows = self.connection().execute(f"SELECT {_COLUMNS} FROM entries {where}", (number,))
        return [Entry(*row) for row in rows]

    def search(self, text: str) -> list[int]:
        """Features whose label or note has words that begin with all the words of `text`, ascending."""
        words = searched(text)
        if not words:
            return []
        rows = self.connection().execute("SELECT rowid FROM words WHERE words MATCH ?", (words,))
        return [row[0] for row in rows]

    def export(self) -> Iterator[str]:
        """JSON lines, every entry of every feature, oldest first (`import_lines` reads them)."""
        for entry in self.since(0):
            fields = asdict(entry)
            del fields["id"]
            yield json.dumps(fields, ensure_ascii=False) + "\n"

    def import_lines(self, lines: Iterable[str]) -> int:
        """Add exported entries, in their order, except those that exist already.

        Returns:
            How many were new.

        Raises:
            UserError: a line is not an entry; nothing was added.
        """
        there = {_identity(entry.feature, entry.label, entry.note, entry.author, entry.written)
                 for entry in self.since(0)}
        rows = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = self._checked(*_parse(line, number))
            if _identity(*row[:4], row[5]) not in there:
                rows.append(row)
        return len(self.write_all(rows))


def _parse(line: str, number: int) -> tuple[int, str, str, str, float | None, str]:
    try:
        fields = json.loads(line)
        row = (fields["feature"], fields["label"], fields.get("note", ""), fields.get("author", ""),
               fields.get("score"), fields.get("written", _now()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"line {number} is not a label: JSON with feature and label is wanted ({error})") from error
    if (type(row[0]) is not int or not all(isinstance(text, str) for text in (*row[1:4], row[5]))
            or not (row[4] is None or isinstance(row[4], int | float))):
        raise UserError(f"line {number} is not a label: feature is a whole number, label, note, author and written are "
                        "texts, score is a number or null")
    return row


def _identity(feature: int, label: str, note: str, author: str, written: str) -> tuple[int, str, str, str, str]:
    return feature, label, note, author, written


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
