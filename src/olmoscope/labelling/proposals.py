"""What programs say about features: labels with their scores, in one SQLite file beside the labels of people.

They are proposals: a person's label, which is in another file (features/labels.py), comes before any of them.
Any number of labellers may propose labels for a feature; the newest one of each labeller and split counts.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from olmoscope.errors import UserError
from olmoscope.features.database import Database, searched
from olmoscope.labelling.labeller import Labelled
from olmoscope.labelling.scores import Scores

PROPOSALS_FILE = "proposals.sqlite"
VERSION = 1
_SCHEMA = """
CREATE TABLE proposals (id INTEGER PRIMARY KEY, feature INTEGER NOT NULL, label TEXT NOT NULL, labeller TEXT NOT NULL,
                        split TEXT NOT NULL, rule TEXT, scores TEXT NOT NULL, written TEXT NOT NULL, verdict TEXT);
CREATE INDEX proposals_of_feature ON proposals (feature, id);
CREATE TABLE without_label (feature INTEGER NOT NULL, labeller TEXT NOT NULL, split TEXT NOT NULL, reason TEXT NOT NULL,
                            PRIMARY KEY (feature, labeller, split));
CREATE VIRTUAL TABLE words USING fts5 (label, prefix = '1 2 3');
"""
_COLUMNS = "id, feature, label, labeller, split, rule, scores, written, verdict"
_SCORES = TypeAdapter(Scores)
Verdict = Literal["accepted", "rejected"]


@dataclass(frozen=True)
class Proposal:
    """A label that a program proposes."""

    id: int
    """Ascending in the order of writing."""
    feature: int
    label: str
    labeller: str
    """Who proposes it (`Labeller.name`)."""
    split: str
    """Which documents it was learned from and scored on (`TextBlocks.identity`)."""
    rule: dict[str, Any] | None
    scores: Scores
    written: str
    """ISO 8601, UTC."""
    verdict: Verdict | None
    """A person's verdict."""

    @property
    def worth(self) -> float:
        """The key by which the proposals for a feature are ordered: the lower end of the detection AUROC's interval, on
        the lines on which all its labels are judged; if that is unknown, on others; else −1."""
        figure = self.scores.on_lines.get("detection", self.scores.detection)
        return -1.0 if figure is None else figure.low


class Proposals(Database):
    """The proposals for one SAE. Any number of threads and processes may use the same file."""

    def __init__(self, path: Path, d_sae: int) -> None:
        """Open the file, making it if it is absent.

        Raises:
            UserError: it is damaged, is not a proposals file, has a later version, or belongs to an SAE of another
                width.
        """
        super().__init__(path, "proposals", VERSION, _SCHEMA, d_sae)

    def add(self, feature: int, labelled: Labelled, labeller: str, split: str) -> None:
        """Add a proposal; when this returns, it is on the disk. A person's verdict on the same label by the same
        labeller also holds for it."""
        earlier = [one for one in self._read("WHERE feature = ? AND labeller = ? AND split = ? ORDER BY id",
                                             feature, labeller, split) if one.label == labelled.label]
        self._add([(feature, labelled.label, labeller, split, _json(labelled.rule), _scores(labelled.scores), _now(),
                    earlier[-1].verdict if earlier else None)])

    def add_reason(self, feature: int, reason: str, labeller: str, split: str) -> None:
        """Note why a labeller has no label for a feature."""
        with self.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO without_label VALUES (?, ?, ?, ?)",
                               (feature, labeller, split, reason))

    def done(self, labeller: str, split: str, clamped: bool = False) -> set[int]:
        """Features for which a labeller has a label, or has said why it has none.

        Args:
            clamped: count only labels that were also scored by clamping the feature.
        """
        rows = self.connection().execute(
            "SELECT feature FROM proposals WHERE labeller = ? AND split = ? "
            "AND coalesce(json_extract(scores, '$.clamped_tokens'), 0) >= ? UNION "
            "SELECT feature FROM without_label WHERE labeller = ? AND split = ?",
            (labeller, split, int(clamped), labeller, split))
        return {row[0] for row in rows}

    def reasons(self, labeller: str, split: str) -> dict[int, str]:
        """Why features have no label from a labeller."""
        return dict(self.connection().execute(
            "SELECT feature, reason FROM without_label WHERE labeller = ? AND split = ?", (labeller, split)).fetchall())

    def of(self, feature: int) -> list[Proposal]:
        """The proposals that count for a feature, the best first, rejected ones last."""
        return _ordered(self._read("WHERE feature = ?", feature))

    def by(self, labeller: str, split: str) -> list[Proposal]:
        """What a labeller proposes, by feature."""
        return sorted(_newest(self._read("WHERE labeller = ? AND split = ?", labeller, split)),
                      key=lambda one: one.feature)

    def best(self) -> dict[int, Proposal]:
        """The best proposal for each feature, among those that nobody rejected."""
        found: dict[int, list[Proposal]] = {}
        for one in self._read(""):
            found.setdefault(one.feature, []).append(one)
        first = {feature: _ordered(proposals)[0] for feature, proposals in found.items()}
        return {feature: one for feature, one in first.items() if one.verdict != "rejected"}

    def judge(self, proposal: int, verdict: Verdict | None) -> Proposal:
        """Record a person's verdict on a proposal.

        Raises:
            UserError: there is no proposal with that number.
        """
        with self.writing() as connection:
            connection.execute("UPDATE proposals SET verdict = ? WHERE id = ?", (verdict, proposal))
            connection.execute("INSERT INTO about VALUES ('judgements', 1) "
                               "ON CONFLICT (key) DO UPDATE SET value = value + 1")
        found = self._read("WHERE id = ?", proposal)
        if not found:
            raise UserError(f"there is no proposal {proposal}; reload the page")
        return found[0]

    def search(self, text: str) -> list[int]:
        """Features with a proposal whose words begin with all the words of `text`, ascending."""
        if not (words := searched(text)):
            return []
        return sorted({row[0] for row in self.connection().execute(
            "SELECT feature FROM proposals WHERE id IN (SELECT rowid FROM words WHERE words MATCH ?)", (words,))})

    def changes(self) -> tuple[int, int]:
        """A value that changes with every proposal and every verdict: the newest proposal, and the number of
        verdicts."""
        newest, judgements = self.connection().execute(
            "SELECT (SELECT coalesce(max(id), 0) FROM proposals), "
            "(SELECT coalesce(max(CAST(value AS INTEGER)), 0) FROM about WHERE key = 'judgements')").fetchone()
        return newest, judgements

    def export(self) -> Iterator[str]:
        """JSON lines, every proposal, oldest first (`import_lines` reads them)."""
        for one in self._read("ORDER BY id"):
            fields = asdict(one)
            del fields["id"]
            yield json.dumps(fields, ensure_ascii=False) + "\n"

    def import_lines(self, lines: Iterable[str]) -> int:
        """Add exported proposals, except those that exist already.

        Returns:
            How many were new.

        Raises:
            UserError: a line is not a proposal; nothing was added.
        """
        there = {(one.feature, one.label, one.labeller, one.split, one.written) for one in self._read("")}
        rows = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                one = _parse(line, number, self.d_sae)
                if (one.feature, one.label, one.labeller, one.split, one.written) not in there:
                    rows.append((one.feature, one.label, one.labeller, one.split, _json(one.rule), _scores(one.scores),
                                 one.written, one.verdict))
        self._add(rows)
        return len(rows)

    def _add(self, rows: list[tuple[int, str, str, str, str | None, str, str, Verdict | None]]) -> None:
        with self.writing() as connection:
            for row in rows:
                cursor = connection.execute(
                    "INSERT INTO proposals (feature, label, labeller, split, rule, scores, written, verdict) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                connection.execute("INSERT INTO words (rowid, label) VALUES (?, ?)", (cursor.lastrowid, row[1]))

    def _read(self, where: str, *values: object) -> list[Proposal]:
        rows = self.connection().execute(f"SELECT {_COLUMNS} FROM proposals {where}", values)
        return [Proposal(id_, feature, label, labeller, split, None if rule is None else json.loads(rule),
                         _SCORES.validate_json(scores), written, verdict)
                for id_, feature, label, labeller, split, rule, scores, written, verdict in rows]


def _newest(proposals: Iterable[Proposal]) -> list[Proposal]:
    """The newest proposal of each feature, labeller and split."""
    by_id = sorted(proposals, key=lambda one: one.id)
    return list({(one.feature, one.labeller, one.split): one for one in by_id}.values())


def _ordered(proposals: Iterable[Proposal]) -> list[Proposal]:
    return sorted(_newest(proposals),
                  key=lambda one: (one.verdict == "rejected", one.verdict != "accepted", -one.worth))


def _parse(line: str, number: int, d_sae: int) -> Proposal:
    try:
        one = TypeAdapter(Proposal).validate_python({**json.loads(line), "id": 0}, strict=False)
    except (json.JSONDecodeError, TypeError, ValidationError) as error:
        raise UserError(f"line {number} is not a proposal of a label ({str(error).splitlines()[0]})") from error
    if not 0 <= one.feature < d_sae:
        raise UserError(f"line {number}: there is no feature {one.feature}: the SAE has features 0 to {d_sae - 1}")
    return one


def _scores(scores: Scores) -> str:
    return _SCORES.dump_json(scores).decode()


def _json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
